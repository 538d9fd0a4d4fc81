"""Benchmarks: work and time beside error, against the published recipes. See __main__."""

import sys
from pathlib import Path

# The tests' helper modules (oracles, populations) are found by name, as under pytest.
if (helpers := str(Path(__file__).parents[1])) not in sys.path:
    sys.path.insert(0, helpers)
