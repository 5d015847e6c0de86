"""The HTTP door of `pylora serve`: OpenAI's interface, adapters at run time, a page, operation."""
