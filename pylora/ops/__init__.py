"""The operations: names, signatures, and those made of others. Nothing is computed here."""
