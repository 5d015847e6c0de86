"""How far a correct implementation may be from the exact result: derived, not chosen."""
