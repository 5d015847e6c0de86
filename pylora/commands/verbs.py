"""All verbs, registered in the order in which --help lists them.

A verb reads its arguments, calls, and prints; what it does is documented where it is done. Imports
of the heavier parts are inside the verbs, so that `pylora --help` is quick.
"""

from pylora.commands import train  # isort: skip  (importing them registers their verbs, in order)
from pylora.commands import evaluate  # isort: skip
from pylora.commands import generate  # isort: skip
from pylora.commands import chat  # isort: skip
from pylora.commands import serve  # isort: skip
from pylora.commands import merge  # isort: skip
from pylora.commands import combine  # isort: skip
from pylora.commands import convert  # isort: skip
from pylora.commands import pack  # isort: skip
from pylora.commands import plan  # isort: skip
from pylora.commands import families, look
from pylora.commands.app import app

__all__ = [
    "app",
    "chat",
    "combine",
    "convert",
    "evaluate",
    "families",
    "generate",
    "look",
    "merge",
    "pack",
    "plan",
    "serve",
    "train",
]
