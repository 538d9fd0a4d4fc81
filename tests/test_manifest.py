"""Manifests: everything wrong is said at once, with file, line and the nearest valid name."""

from pathlib import Path

import pytest

from pipeline.errors import ManifestError
from pipeline.manifest import load_manifest, parse_manifest
from pipeline.tomllines import line_of, table_lines
from tasks.training_results import FINAL_QUANTITIES

GOOD = """\
name = "small"
seed = 3

[data]
name = "digits"
samples = 20

[[train]]
network = "vit"
patch_size = 4
width = [16, 24]
heads = 2
seed = [0, 1]

[[measurements]]
metric = "normalized_mls"

[[measurements]]
metric = "normalized_mls"
method = "dense"

[[measurements]]
metric = "adaptive_sharpness"
rho = 0.05

[[correlations]]
x = "normalized_mls"
y = "adaptive_sharpness"

[resources]
num_cpus = 1
"""

TWICE = 'name = "a"\n[[train]]\nname = "a-width=16"\nnetwork = "mlp"\n'


def parse(text: str):
    return parse_manifest(text, where="m.toml", root=Path("/nowhere"))


def problems(text: str) -> list[str]:
    with pytest.raises(ManifestError) as caught:
        parse(text)
    return str(caught.value).splitlines()


def test_good_manifest_expands_grids_and_names_twins():
    manifest = parse(GOOD)
    assert [t.name for t in manifest.train] == [
        "vit-width=16-seed=0", "vit-width=16-seed=1", "vit-width=24-seed=0", "vit-width=24-seed=1",
    ]  # fmt: skip
    assert [m.series("normalized_mls") for m in manifest.measurements[:2]] == [
        "normalized_mls",
        "normalized_mls@dense",
    ]
    assert manifest.measurements[2].measurement.rho == 0.05  # pyright: ignore
    assert manifest.correlations[0].transform_x == "log"


def test_pair_plot_holds_all_series_of_the_manifest_unless_it_lists_them():
    assert parse(GOOD).pair_plot is None
    plot = parse(GOOD + "[pair_plot]\n").pair_plot
    assert plot is not None
    assert plot.series == (
        "normalized_mls", "mls", "normalized_mls@dense", "mls@dense", "adaptive_sharpness",
        "squared_error", *FINAL_QUANTITIES,
    )  # fmt: skip
    listed = parse(GOOD + '[pair_plot]\nseries = ["test_loss", "mls"]\n').pair_plot
    assert listed is not None
    assert listed.series == ("test_loss", "mls")


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ('series = ["mls"]', "34: series: Tuple should have at least 2 items"),
        ('series = ["mls", "mls"]', "33: series names one twice: ['mls', 'mls']"),
        ('series = ["mls", "mlss"]', "34: 'mlss' is measured nowhere in this manifest. Did you"),
        ('transforms = { mls = "lg" }', "34: transforms.mls: Input should be"),
        ('transforms = { mlss = "log" }', "34: 'mlss' is not in the pair plot. Did you mean 'mls'"),
        ('\n[pair_plot.transforms]\nmlss = "log"', "36: 'mlss' is not in the pair plot."),
        ("serie = []", "34: unknown key 'serie'. Did you mean 'series'?"),
    ],
)
def test_problems_of_the_pair_plot_have_lines_and_near_names(lines: str, problem: str):
    (found,) = problems(f"{GOOD}\n[pair_plot]\n{lines}\n")
    assert found.startswith(f"m.toml:{problem}")
    (kind,) = problems(f"pair_plot = true\n{GOOD}")
    assert kind.startswith("m.toml:1: pair_plot: Input should be a valid dictionary")


def test_all_problems_are_reported_at_once_with_their_lines():
    bad = (
        GOOD.replace("samples = 20", "sample = 20")
        .replace('metric = "adaptive_sharpness"', 'metric = "adaptive_sharpnes"')
        .replace("num_cpus = 1", 'num_cpus = "one"')
        .replace('network = "vit"', 'network = "vitt"')
        .replace("seed = 3", "seed = -3")
    )
    found = problems(bad)
    assert found[0].startswith("m.toml:2: seed: ")
    assert found[1] == "m.toml:6: unknown key 'sample'. Did you mean 'samples'?"
    assert found[2].startswith("m.toml:9: network: ")
    assert "Did you mean 'vit'?" in found[2]
    assert found[3].startswith("m.toml:23: unknown metric 'adaptive_sharpnes'. Did you mean")
    assert found[4].startswith("m.toml:31: resources.num_cpus: ")
    assert len(found) == 5


@pytest.mark.parametrize(
    ("before", "after", "line", "words"),
    [
        ('name = "digits"', 'name = "digit"', 5, "Did you mean 'digits'?"),
        ("rho = 0.05", "rho = -1", 24, "greater than 0"),
        ("rho = 0.05", 'rho = "big"', 24, "valid number"),
        ("rho = 0.05", "rh = 0.05", 24, "Did you mean 'rho'?"),
        ("num_cpus = 1", "num_gpus = 0.3", 31, "1/k"),
        ("num_cpus = 1", "gpus = 1", 31, "Did you mean 'num_gpus'?"),
        ("heads = 2", "momentum = []", 12, "empty list"),
        ("seed = [0, 1]", "seed = [0, 0]", 13, "lists a value twice"),
        ("seed = [0, 1]", TWICE, 14, "two trained checkpoints are named 'a-width=16'"),
        ('method = "dense"', 'method = "lanczos"\ntolerance = 2.0', 21, "tolerance"),
        ('y = "adaptive_sharpness"', 'y = "normalized_mls"', 26, "two different series"),
        ('name = "small"', 'name = "../small"', 1, "pattern"),
        ('name = "small"', 'name = "small"\nmeasurement = 3', 2, "Did you mean 'measurements'?"),
    ],
)  # fmt: skip
def test_each_problem_names_its_line_and_what_to_do(before, after, line, words):
    (found,) = problems(GOOD.replace(before, after, 1))
    assert found.startswith(f"m.toml:{line}: "), found
    assert words in found


def test_missing_table_is_reported_as_required():
    (found,) = problems(GOOD.replace('[data]\nname = "digits"\nsamples = 20\n', ""))
    assert found == "m.toml:1: key 'data' is required and missing"


def test_manifest_without_checkpoints_is_refused():
    (found,) = problems('name = "x"\n[data]\nname = "digits"\n')
    assert "nothing to audit" in found


def test_unknown_timm_model_gets_the_nearest_name():
    text = GOOD + '\n[[checkpoints]]\nsource = "timm"\nnames = ["vit_tiny_patch16_225"]\n'
    (found,) = problems(text)
    assert found.startswith("m.toml:35: timm ")
    assert "Did you mean 'vit_tiny_patch16_224" in found


def test_missing_checkpoint_folder_is_reported_with_its_full_path(tmp_path):
    text = GOOD + '\n[[checkpoints]]\nsource = "local"\npaths = ["models/*"]\n'
    (found,) = problems(text)
    assert "/nowhere/models/*" in found
    (tmp_path / "models" / "a").mkdir(parents=True)
    manifest = parse_manifest(text, where="m.toml", root=tmp_path)
    assert manifest.local[0][1] == (tmp_path / "models" / "a",)


def test_relative_data_root_starts_at_the_manifest(tmp_path):
    text = GOOD.replace("samples = 20", 'samples = 20\nroot = "images"')
    assert parse_manifest(text, where="m.toml", root=tmp_path).data.root == str(tmp_path / "images")


def test_invalid_toml_and_unreadable_files_are_named(tmp_path):
    assert "not valid TOML" in problems("name = [")[0]
    with pytest.raises(ManifestError, match="cannot read the manifest"):
        load_manifest(tmp_path / "none.toml")


def test_lines_are_found_through_arrays_of_tables_and_dotted_keys():
    lines = table_lines("a = 1\n[b]\nc.d = 2\n[[e]]\nf = 1\n[[e]]\n'g h' = [\n 1,\n]\n[e.i]\nj=1\n")
    assert line_of(lines, ("b", "c", "d")) == 3
    assert line_of(lines, ("e", 0, "f")) == 5
    assert line_of(lines, ("e", 1, "g h")) == 7
    assert line_of(lines, ("e", 1, "i", "j")) == 11
    assert line_of(lines, ("e", 1, "missing")) == 6


def test_a_wrong_tag_is_named_with_those_that_there_are():
    text = GOOD + '\n[[checkpoints]]\nsource = "timm"\nnames = ["levit_128s.nonsense"]\n'
    message = r"has no pretrained model 'levit_128s\.nonsense'\. Its tags: fb_dist_in1k"
    with pytest.raises(ManifestError, match=message):
        parse_manifest(text, where="m", root=Path("/nowhere"))
