"""What a law is tried with: hypothesis strategies for layers, plans, attention and whole models."""
