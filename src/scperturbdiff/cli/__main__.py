"""`python -m scperturbdiff.cli`."""

import sys

from scperturbdiff.cli._main import main

sys.exit(main())
