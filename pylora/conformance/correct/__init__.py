"""Correct implementations of the protocol in NumPy, which the kit itself is tested with."""
