"""Merging an adapter into its base model, and taking it out again bit for bit."""
