"""The process that does units: what it loads, and what it leaves alone."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from populations import save_mlp, write_manifest

from pipeline.run import start_run

PROGRAM = """
print("program loaded", flush=True)
if __name__ == "__main__":
    import pickle, sys
    from pathlib import Path
    from pipeline.slot import SlotActor
    actor = SlotActor(60.0)
    for subject in ("one", "another"):
        print(pickle.loads(actor.run(subject, Path(sys.argv[1]).read_bytes())).status)
    print("torch" in sys.modules)
"""


@pytest.mark.slow
def test_children_do_not_load_the_program_that_ray_runs_in_the_slot(tmp_path: Path):
    save_mlp(tmp_path / "checkpoints/mlp")
    run = start_run(write_manifest(tmp_path / "m.toml"), str(tmp_path / "run"))
    (tmp_path / "task").write_bytes(pickle.dumps(run.plan().units[0]))
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, tmp_path / "program.py", tmp_path / "task"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    lines = done.stdout.split("\n")
    assert lines.count("program loaded") == 1, done.stdout
    assert lines[1:4] == ["committed", "duplicate", "False"], done.stdout + done.stderr
