"""Running the kit on an implementation: the search, what it reports, and a failure as a program."""
