"""Predicted against measured time of units: does the cost model hold for networks it never saw?

Real units (normalized_mls, adaptive_sharpness) of one small network per family with random weights,
each checkpoint in a process of its own so that its memory is its own. Rates are fitted to the units
of all architectures but one, as ``flatcensus plan`` fits them, and predict the units of that one.
Processor time is compared, the least of some repetitions, because the machine may be shared.

``ratio`` is measured over predicted; ``nominal_ratio`` the same before any calibration;
``memory_ratio`` measured over predicted peak memory, both without the process itself, for
the first unit of a process (a process's peak does not go down).
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import timm
import torch
from populations import Quiet, write_manifest
from rich.table import Table

from pipeline.calibration import Observation, calibrate
from pipeline.cost import block_work, nominal_rates, set_up_work
from pipeline.device_classes import DEVICE_CLASSES
from pipeline.run import execute, start_run
from pipeline.shards import list_shards, peek_record
from tasks.checkpoint_folder import save_checkpoint
from tasks.checkpoints import architecture_family
from tasks.work import peak_bytes

# One small member per family: pixels, and whether its constructor has to know them.
ARCHITECTURES = {
    "vit_tiny_patch16_224": (160, True),
    "vit_relpos_small_patch16_224": (112, True),
    "crossvit_tiny_240": (240, False),
    "convit_tiny": (112, True),
    "levit_128s": (224, False),
    "tiny_vit_5m_224": (224, False),
    "efficientvit_b0": (160, False),
    "efficientvit_m0": (224, False),
    "mobilevit_xxs": (128, False),
    "mobilevitv2_050": (128, False),
    "fastvit_t8": (128, False),
    "repvit_m0_9": (128, False),
    "shvit_s1": (160, False),
    "mvitv2_tiny": (224, False),
    "davit_tiny": (96, False),
}
SAMPLES, BATCH, DRAWS, REPEATS = 8, 4, 4, 2
MEASUREMENTS = f"""[[measurements]]
metric = "normalized_mls"
[[measurements]]
metric = "adaptive_sharpness"
min_draws = {DRAWS}
max_draws = {DRAWS}
"""


def run(architectures: Sequence[str] = tuple(ARCHITECTURES)) -> list[dict[str, Any]]:
    """Measure units of every architecture, then predict each from the others.

    Returns:
        One dictionary per unit: what it is, measured and predicted seconds of a core.
    """
    units: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    for name in architectures:
        tries = []
        for _ in range(REPEATS):
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                tries.append(pool.submit(_measured, name).result())
        units += [
            {**same[0], "seconds": min(unit["seconds"] for unit in same)}
            for same in zip(*tries, strict=True)
        ]
    nominal = nominal_rates(DEVICE_CLASSES["cpu"])
    for unit in units:
        others = [_observed(other) for other in units if other["network"] != unit["network"]]
        fitted = calibrate(others, nominal, spread=2.0)
        seen = _observed(unit)
        for name, rates in (("ratio", fitted.rates), ("nominal_ratio", nominal)):
            unit[name] = unit["seconds"] / rates.seconds(seen.work, num_images=seen.num_images)
        unit["spread"] = fitted.spread
    return [{k: v for k, v in unit.items() if k != "work"} for unit in units]


def table(rows: list[dict[str, Any]]) -> Table:
    """One line per unit."""
    shown = Table(
        "network", "family", "measurement", "CPU s", "measured / predicted", "uncalibrated",
        "memory, measured / predicted", title="Cost: units of architectures never measured before",
    )  # fmt: skip
    for row in rows:
        shown.add_row(
            row["network"], row["family"], row["metric"], f"{row['seconds']:.2f}",
            f"{row['ratio']:.2f}", f"{row['nominal_ratio']:.2f}", f"{row['memory_ratio']:.2g}",
        )  # fmt: skip
    return shown


def _observed(unit: dict[str, Any]) -> Observation:
    return Observation(unit["network"], unit["work"], SAMPLES, 1.0, unit["seconds"])


def _measured(name: str) -> list[dict[str, Any]]:
    """Units of one architecture, measured in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    size, is_told = ARCHITECTURES[name]
    arguments: dict[str, Any] = {"num_classes": 10, **({"img_size": size} if is_told else {})}
    with tempfile.TemporaryDirectory(prefix="flatcensus-bench-") as folder:
        path = Path(folder)
        save_checkpoint(
            timm.create_model(name, **arguments), path / "checkpoints" / name, architecture=name,
            model_args=arguments, family=architecture_family(name),
            data_config={"input_size": (3, size, size), "crop_pct": 1.0},
        )  # fmt: skip
        manifest = write_manifest(
            path / "m.toml", samples=SAMPLES, measurements=MEASUREMENTS,
            resources=f"batch_size = {BATCH}\nunit_seconds = 1e6",
        )  # fmt: skip
        run = start_run(manifest, str(path / "run"))
        before = _resident()
        observer = Quiet()
        result = execute(run, observer, on="inline")
        if result.failed:
            raise RuntimeError(f"{name}: {'; '.join(observer.notes)}")
        specs = {item.spec.key: item.spec for item in run.plan().specs}
        found = []
        for key, shards in list_shards(run.store).items():
            (shard,) = shards
            record, spec = peek_record(run.store, shard.key), specs[key]
            assert record is not None
            assert spec.entry is not None
            work = block_work(spec, shard.block, BATCH)
            if record.self_tested:
                work += set_up_work(spec)
            predicted = peak_bytes(
                spec.entry.measurement, spec.network, batch_size=BATCH, itemsize=4
            )
            found.append(
                {
                    "network": name, "family": spec.family, "metric": spec.metric, "work": work,
                    "seconds": (record.cpu_seconds or 0.0) - (record.load_seconds or 0.0),
                    "peak_bytes": record.peak_bytes, "resident_bytes": before,
                    "memory_ratio": ((record.peak_bytes or 0) - before) / predicted,
                    "started_at": record.started_at,
                }
            )  # fmt: skip
    first, *others = sorted(found, key=lambda unit: unit["started_at"])
    return [first, *({**unit, "memory_ratio": float("nan")} for unit in others)]


def _resident() -> int:
    """Memory that this process holds now, in bytes."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096
