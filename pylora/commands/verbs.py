"""All verbs, registered: thin faces on the Python functions of the same names.

A verb reads its arguments, calls, and prints; what it does is documented where it is done. Imports
of the heavier parts are inside the verbs, so that `pylora --help` is quick. Needs the `cli` extra.
"""

from pylora.commands import work  # isort: skip  (importing them registers their verbs, in order)
from pylora.commands import chat, look
from pylora.commands.app import app

__all__ = ["app", "chat", "look", "work"]
