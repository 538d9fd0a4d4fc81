"""Random faults during real launches: ``make campaign``.

    python -m tests.campaigns [--faults N | --episodes N] [--minutes M] [--seed S] [--flips N]
                              [--place PLACE ...] [--only KIND ...] [--out FILE]

Each episode takes a small run from nothing to its end through the command line, with about ten
faults on the way, and compares it with an undisturbed one. Its seed decides where it runs and what
is done to it; how far the launch is at that moment is not in its hands. Episodes are appended to
FILE, and their table is printed; the exit code is 1 if one broke a promise.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]

if __name__ == "__main__":
    if "FLATCENSUS_CAMPAIGN" in os.environ:
        from campaigns.campaign import main

        sys.exit(main())
    # Once more from a copy of the sources, with an environment that all processes share.
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from campaigns.workshop import end_orderly, prepare

    folder = Path(tempfile.mkdtemp(prefix="fc-", dir="/tmp"))  # short: Ray's sockets are below it
    end_orderly()
    process = None
    try:
        environment = prepare(folder)
        environment["FLATCENSUS_CAMPAIGN_FROM"] = os.getcwd()
        command = [sys.executable, "-m", "campaigns", *sys.argv[1:]]
        process = subprocess.Popen(command, env=environment, cwd=folder)
        code = process.wait()
    finally:
        if process is not None and process.poll() is None:
            process.terminate()  # it has clusters to end
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(code)
