"""The ``flatcensus`` command with the measurement of campaigns in its registry."""

import sys

import campaigns.measured  # noqa: F401
from pipeline.cli import main

if __name__ == "__main__":
    sys.argv[0] = "flatcensus"
    main()
