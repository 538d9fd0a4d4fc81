"""What is shipped: the layers of the packages, and the wheel."""

from __future__ import annotations

import ast
import email
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MACHINERY = {"ray", "pyarrow", "typer", "pandas", "duckdb", "rich", "jinja2", "matplotlib"}
# Ray imports these in every worker before the child process exists: they must stay light.
LIGHT = ("slot", "outcome", "schema", "versions", "errors", "cli", "console", "durations")


def sources(package: str) -> list[Path]:
    found = sorted((ROOT / package).glob("*.py"))
    assert len(found) > 10
    return found


def imports(path: Path, *, inside_functions: bool = True) -> set[str]:
    """Top-level names of what a file imports, type checking aside."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree)) if inside_functions else tree.body
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("path", sources("tasks"), ids=lambda p: p.stem)
def test_the_mathematics_knows_no_machinery(path: Path):
    assert not imports(path) & (MACHINERY | {"pipeline"})


@pytest.mark.parametrize("name", LIGHT)
def test_modules_that_start_everything_load_nothing_heavy(name: str):
    heavy = {"torch", "timm", "ray", "pandas", "duckdb", "matplotlib"}
    assert not imports(ROOT / f"pipeline/{name}.py", inside_functions=False) & heavy


def test_a_slot_loads_without_torch():
    code = "import sys, pipeline.slot; print([m for m in ('torch', 'timm') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


def test_every_third_party_import_is_a_declared_dependency():
    declared = {
        re.split(r"[\[<>=]", line)[0]
        for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    }
    names = {"PIL": "pillow", "sklearn": "scikit-learn", "huggingface_hub": "huggingface-hub"}
    used = {
        names.get(name, name)
        for package in ("pipeline", "tasks")
        for path in sources(package)
        for name in imports(path)
        if name not in sys.stdlib_module_names and name not in ("pipeline", "tasks")
    }
    # httpx and requests come with huggingface-hub, whose errors they are.
    assert used - {"httpx", "requests"} <= declared


def test_no_source_file_names_a_place_of_its_making():
    for package in ("pipeline", "tasks"):
        for path in sources(package):
            assert not re.search(r"/(work|home)/\w|pitfalls", path.read_text()), path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel of the sources, built offline beside them, so that nothing is left in the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("pipeline", "tasks"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    (folder / "tests").mkdir()
    (folder / "runs").mkdir()
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "out", "."],
        cwd=folder, check=True, capture_output=True, text=True,
    )  # fmt: skip
    (path,) = (folder / "out").glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_two_packages_and_nothing_else(wheel: zipfile.ZipFile):
    top = {name.partition("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"pipeline", "tasks"}
    assert len(top) == 3


def test_the_wheel_holds_every_source_and_data_file(wheel: zipfile.ZipFile):
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {
        str(path.relative_to(ROOT))
        for package in ("pipeline", "tasks")
        for path in (ROOT / package).iterdir()
        if path.is_file()
    }
    assert shipped == expected
    assert {"pipeline/demo.toml", "pipeline/report.html.j2"} <= shipped


def test_the_wheel_has_the_command_the_license_and_the_readme(wheel: zipfile.ZipFile):
    def text(name: str) -> str:
        (found,) = [n for n in wheel.namelist() if n.endswith(f".dist-info/{name}")]
        return wheel.read(found).decode()

    assert "flatcensus = pipeline.cli:main" in text("entry_points.txt")
    assert "Permission is hereby granted" in text("licenses/LICENSE")
    about = email.message_from_string(text("METADATA"))
    assert about["Name"] == "flatcensus"
    assert about["Requires-Python"] == ">=3.11"
    assert about.get_payload()


def test_a_wheel_runs_from_another_folder(wheel: zipfile.ZipFile, tmp_path: Path):
    wheel.extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import pipeline.demo, pipeline.manifest\n"
        f"assert pipeline.__file__.startswith({str(tmp_path)!r}), pipeline.__file__\n"
        "with pipeline.demo.demo_manifest() as path:\n"
        "    print(pipeline.manifest.load_manifest(path).name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "demo"


def test_the_command_is_an_entry_point_of_the_installation():
    (entry,) = [e for e in metadata.entry_points(group="console_scripts") if e.name == "flatcensus"]
    assert entry.value == "pipeline.cli:main"
    assert entry.load().__name__ == "main"
