"""Continuing token ids: many prompts at once, each with its own adapter."""
