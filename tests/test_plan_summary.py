"""Totals of a plan: hours, memory, downloads, and what is not predicted. No hub is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import call
from PIL import Image
from populations import save_mlp, write_manifest
from timm.data import ImageNetInfo

from pipeline.hub_file import HubFile
from pipeline.lock import Lock, lock_path, timm_key, write_lock
from pipeline.plan_summary import cost_lines
from pipeline.plan_view import MAX_LINES, plan_cost
from pipeline.run import Run, start_run

NAMES = ["levit_128s.fb_dist_in1k", "repvit_m0_9.dist_300e_in1k"]
BOTH = (
    '[[measurements]]\nmetric = "normalized_mls"\n[[measurements]]\nmetric = "adaptive_sharpness"\n'
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each of ImageNet's 1000 classes."""
    root = tmp_path_factory.mktemp("images")
    for label, name in enumerate(ImageNetInfo().label_names()):
        folder = root / name
        folder.mkdir()
        Image.new("RGB", (8, 8), (label % 256, label // 256, 7)).save(folder / "a.png")
    return root


def census(folder: Path, images: Path, *, resources: str = "", names: list[str] = NAMES) -> Run:
    """The plan's subject; every name is locked, so nobody is asked."""
    path = folder / "census.toml"
    path.write_text(
        f'name = "census"\n[data]\nname = "image-folder"\nroot = "{images}"\nsamples = 100\n'
        f'[[checkpoints]]\nsource = "timm"\nnames = {names!r}\n{BOTH}[resources]\n{resources}\n'
    )
    files = {
        timm_key(name, None): (
            HubFile(f"timm/{name}", "0" * 40, "model.safetensors", size, "0" * 64),
        )
        for name, size in zip(names, (31_000_000, None), strict=True)
    }
    write_lock(lock_path(path), Lock(files))
    return start_run(path, str(folder / "run"))


def test_totals_name_device_hours_memory_and_downloads(tmp_path: Path, images: Path):
    run = census(tmp_path, images, resources='num_gpus = 1\ndevice = "h100"\nmax_slots = 2')
    plan = run.plan()
    cost = plan_cost(run, plan)
    low, middle, high = cost.slot_seconds
    assert low < middle < high
    assert middle == pytest.approx(plan.predicted_seconds + cost.load_seconds)
    assert cost.device_hours[1] == pytest.approx(middle / 3600)
    assert cost.wall_seconds == pytest.approx((low / 2, middle / 2, high / 2))
    assert cost.device_unit == "GPU-hours"
    assert cost.peak is not None
    assert cost.peak.fits
    repvit = next(s.spec for s in plan.specs if s.spec.checkpoint == NAMES[1])
    assert cost.download_bytes == 31_000_000 + repvit.network.weight_bytes
    assert cost.downloads_estimated == 1
    text = "\n".join(cost_lines(cost))
    for words in (
        "NVIDIA H100 SXM (data sheet; efficiency estimated, not measured)", "GPU-hours (",
        "elapsed: about", "memory: ", "1 file estimated from parameters",
        "not predicted: adaptive_sharpness beyond its present look, on 2 checkpoints",
        "not predicted: how fast your machines are",
    ):  # fmt: skip
        assert words in text, words


def test_a_batch_that_does_not_fit_is_told_with_one_that_does(tmp_path: Path, images: Path):
    resources = 'num_gpus = 1\ndevice = "t4"\nbatch_size = {}'
    run = census(tmp_path, images, resources=resources.format(1024))
    cost = plan_cost(run, run.plan())
    assert cost.peak is not None
    assert cost.peak.fits is False
    fitting = cost.peak.fitting_batch_size
    assert f"batch_size = {fitting} fits" in "\n".join(cost_lines(cost))
    run = census(tmp_path, images, resources=resources.format(fitting))
    peak = plan_cost(run, run.plan()).peak
    assert peak is not None
    assert peak.fits


def test_units_last_as_long_on_any_device_where_images_allow(tmp_path: Path, images: Path):
    """Lengths follow the device class, so a faster one gets fewer and larger units."""
    lengths = {}
    for device in ("t4", "h100"):
        run = census(tmp_path, images, resources=f'num_gpus = 1\ndevice = "{device}"')
        plan = run.plan()
        lengths[device] = len(plan.units)
        assert plan.units
        for unit in plan.units:
            whole = len(unit.block.samples) * len(unit.block.draws)
            # At most twice what is wanted, but for the least that a measurement allows.
            assert unit.predicted_seconds <= 120 or whole <= 32
    assert lengths["h100"] <= lengths["t4"]


def test_large_plans_are_shown_by_family_and_json_has_every_checkpoint(tmp_path: Path):
    number = MAX_LINES // 2 + 1
    for seed in range(number):
        save_mlp(tmp_path / f"checkpoints/mlp{seed}", seed=seed)
    path = write_manifest(tmp_path / "m.toml", samples=16, measurements=BOTH)
    answer = call("plan", path, "--run", tmp_path / "run")
    assert answer.out.count("mlp ") == 2, "one line for each measurement of the family"
    assert f" {number} " in answer.out
    *records, last = call("plan", path, "--run", tmp_path / "run", "--json").records
    assert len(records) == 2 * number
    assert last["totals"]["units"] == 2 * number
    assert last["totals"]["device_unit"] == "CPU-hours"


def test_a_finished_plan_predicts_nothing(tmp_path: Path):
    save_mlp(tmp_path / "checkpoints/mlp")
    path = write_manifest(tmp_path / "m.toml", samples=8)
    assert call("launch", path, "--run", tmp_path / "run", "--on", "inline").code == 0
    answer = call("plan", path, "--run", tmp_path / "run")
    assert "nothing is left to do" in answer.err
    assert "not predicted" not in answer.err
