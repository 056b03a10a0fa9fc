"""``python -m dhcl_ops``: the doctor's report."""

import sys

from dhcl_ops.doctor import main

sys.exit(main())
