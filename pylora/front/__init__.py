"""The front door: `pylora.load` gives one object that generates, chats, trains and merges."""
