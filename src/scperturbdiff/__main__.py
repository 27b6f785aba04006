"""`python -m scperturbdiff`."""

import sys

from scperturbdiff.cli import main

sys.exit(main())
