"""Text to token ids and back; conversations to text. Knows no model and no file format."""
