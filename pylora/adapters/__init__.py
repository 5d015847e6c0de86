"""Adapters as plain data: settings, plan, A and B by module path, PEFT directories, the pool."""
