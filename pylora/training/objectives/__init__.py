"""What a run may aim at besides the next token: preferences, classes and numbers, a teacher."""
