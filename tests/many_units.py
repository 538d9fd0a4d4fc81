"""Runs of very many units that cost nothing: what they take is the engine's own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

from populations import save_mlp, write_manifest

from pipeline.run import Run, start_run
from pipeline.units import UnitGroup
from tasks.block import Block
from tasks.measurement import Columns, Estimate, Measurement, Row, Subject
from tasks.outline import Outline
from tasks.registry import METRICS
from tasks.sample_mean import sample_mean

MAX_LINKS = 30_000  # of one file; ext4 allows 65,000


class Tiny(Measurement):
    """A number per sample and draw that takes no time.

    Attributes:
        number: Tells otherwise equal measurements apart.
        draws: Weight draws of each sample.
    """

    metric: ClassVar[str] = "tiny"
    version: ClassVar[int] = 1
    quantities: ClassVar[tuple[str, ...]] = ("tiny",)
    coverage_fields: ClassVar[frozenset[str]] = frozenset({"draws"})

    number: int = 0
    draws: int = 1

    def stages(self, num_samples: int, available: int) -> list[Block]:
        return [Block(range(num_samples), range(self.draws))]

    def measure(self, subject: Subject, block: Block) -> list[Row]:
        return [
            Row("tiny", float(sample + self.number), sample=sample, draw=draw)
            for draw in block.draws
            for sample in block.samples
        ]

    def summarize(self, rows: Columns) -> list[Estimate]:
        return [sample_mean(rows, "tiny")]

    def forward_equivalents(self, network: Outline) -> float:
        return 1.0


def register() -> None:
    """Make the measurement known to manifests of this process."""
    METRICS["tiny"] = Tiny


def many_units(
    folder: Path,
    *,
    checkpoints: int,
    measurements: int = 1,
    samples: int = 10,
    draws: int = 1,
    resources: str = "",
) -> Run:
    """A run of ``checkpoints * measurements * samples * draws`` units, one pair in each.

    Checkpoints are copies of one small MLP that differ in a weight.
    """
    first = save_mlp(folder / "checkpoints/mlp000000")
    config = (first / "config.json").read_bytes()
    weights = bytearray((first / "model.safetensors").read_bytes())
    for number in range(1, checkpoints):
        copy = folder / f"checkpoints/mlp{number:06d}"
        copy.mkdir()
        (copy / "config.json").write_bytes(config)
        weights[-4:-1] = number.to_bytes(3, "little")  # the mantissa of the last one: stays finite
        (copy / "model.safetensors").write_bytes(weights)
    entry = '[[measurements]]\nmetric = "tiny"\nnumber = {0}\nlabel = "m{0}"\ndraws = {1}\n'
    manifest = write_manifest(
        folder / "many.toml", samples=samples,
        measurements="".join(entry.format(number, draws) for number in range(measurements)),
        resources=f"unit_seconds = 1e-9\n{resources}",
    )  # fmt: skip
    return start_run(manifest, str(folder / "run"))


def pretend_done(run: Run, groups: list[UnitGroup], *, content: bytes = b"") -> int:
    """Files under the names of these units' shards, linked to few: for listings alone."""
    root, number = Path(run.store.uri), 0
    source = root / "unused"
    for group in groups:
        folder = root / "shards" / group.spec.key
        folder.mkdir(parents=True, exist_ok=True)
        for unit in group:
            if number % MAX_LINKS == 0:
                source.unlink(missing_ok=True)
                source.write_bytes(content)
            samples, draws = unit.block.samples, unit.block.draws
            name = f"{samples.start}-{samples.stop}"
            if draws != range(1):
                name += f"x{draws.start}-{draws.stop}"
            os.link(source, folder / f"{name}.parquet")
            number += 1
    source.unlink(missing_ok=True)
    return number
