"""``python -m dhcl``: the command ``dhcl``."""

import sys

from dhcl.cli import main

sys.exit(main())
