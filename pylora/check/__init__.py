"""`pylora check`: proves on a user's own model and adapter what pylora promises, with numbers."""
