"""The command line: thin faces on the Python functions of the same names. Nothing imports it."""
