"""Reading within bounds, and writing whole or not at all; no format is known here."""
