"""The front door: one object that knows its model, tokenizer and adapters (`pylora.load`)."""
