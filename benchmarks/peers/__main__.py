"""`python -m benchmarks.peers` runs the comparison; `--help` lists the flags."""

import sys

from .runner import main

sys.exit(main())
