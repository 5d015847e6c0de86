"""`python -m pylora` is the command `pylora`."""

import sys

from pylora.commands.cli import main

sys.exit(main())
