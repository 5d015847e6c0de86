"""`python -m pylora` is the command `pylora`."""

import sys

from pylora.cli import main

sys.exit(main())
