"""The decoder: its configuration, its layers with their backward passes, KV cache and batches."""
