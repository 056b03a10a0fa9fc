"""``python -m dhcl_ops``: the doctor's report."""

import sys

from dhcl_ops._doctor import main

sys.exit(main())
