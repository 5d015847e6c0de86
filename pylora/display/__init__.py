"""What a person sees: progress and tables in a terminal, pictures. Nothing is computed here."""
