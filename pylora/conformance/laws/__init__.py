"""The laws: what every implementation of LoRA must keep, by subject. registry.py has them all."""
