"""Specs and tasks: what determines a number (a spec and its key), what a worker is handed (a task).

A *spec* is one checkpoint × one measurement with its settings, or one training. Its ``key`` is the
SHA-256 of everything that determines its rows and of nothing else; batch size, device, unit size,
paths and attempts stay out, so they may change between runs without recomputing anything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pipeline.entries import DataSpec, MeasurementEntry, TrainEntry
from pipeline.hub_file import UNLOCKED, HubFile
from tasks.block import Block
from tasks.checkpoints import CheckpointRef
from tasks.outline import Outline
from tasks.training_results import FINAL_QUANTITIES

KEY_VERSION = 1  # part of every key: bump when the meaning of the key's fields changes
KEY_DIGITS = 24  # 96 bits
TRAINING_BLOCK = Block(range(1))


@dataclass(frozen=True)
class TrainedRef:
    """A checkpoint that a training spec of this manifest makes; its weights may not exist yet."""

    entry: TrainEntry
    spec_key: str


@dataclass(frozen=True)
class Spec:
    """One row of the plan: a key, its fields, and how to measure.

    ``label_map`` holds the network's output for each class of the data, None where they are the
    same; ``data_files`` are the hub's files of each split, for workers to open. ``stored`` is the
    key of the folder in the store that holds a checkpoint which this run trained.
    """

    key: str
    kind: Literal["train", "measure"]
    checkpoint: str
    family: str
    tag: str
    metric: str
    label: str
    fields: dict[str, Any]
    ref: CheckpointRef | None
    entry: MeasurementEntry | None
    train: TrainEntry | None
    data: DataSpec
    data_identity: str
    available: int
    num_samples: int
    network: Outline
    label_map: tuple[int, ...] | None = None
    with_labels: bool = True
    data_files: Mapping[str, tuple[HubFile, ...]] = field(default_factory=dict)
    stored: str | None = None

    def stages(self) -> list[Block]:
        """Growing blocks of samples and draws; a training is one unit."""
        if self.entry is None:
            return [TRAINING_BLOCK]
        return self.entry.measurement.stages(self.num_samples, self.available)

    @property
    def alignment(self) -> int:
        """Unit boundaries are multiples of this many samples."""
        return 1 if self.entry is None else self.entry.measurement.alignment

    @property
    def quantities(self) -> tuple[str, ...]:
        """Quantities whose estimates this spec gives."""
        return FINAL_QUANTITIES if self.entry is None else self.entry.measurement.quantities

    def series(self, quantity: str) -> str:
        """Name of a quantity in this run's tables."""
        return quantity if self.entry is None else self.entry.series(quantity)

    @property
    def training_identity(self) -> str | None:
        """Identity of the training images that its measurement takes besides, if it does."""
        return self.fields.get("training_data")

    @property
    def note(self) -> str:
        """What is to be known before it runs; empty if nothing."""
        notes = [] if self.entry is None else [self.entry.measurement.note(self.network)]
        if self.ref is not None and self.ref.identity.startswith(UNLOCKED):
            notes.append("weights not locked: the hub could not be asked")
        if self.data_identity.startswith(UNLOCKED):
            notes.append(f"images unknown: {self.data_identity.removeprefix(UNLOCKED)}")
        return "; ".join(note for note in notes if note)

    @property
    def subject(self) -> str:
        """Units with equal subjects share a worker's loaded network and images."""
        if self.ref is None:
            return self.key
        images = f"{self.data_identity}|{self.training_identity or ''}"
        return f"{self.ref.identity}|{self.ref.architecture}|{images}|{self.fields['dtype']}"


@dataclass(frozen=True)
class Task:
    """One unit as a worker gets it: a spec, a block, and the circumstances of this attempt.

    ``predicted_bytes`` is the peak memory of its process or, on a GPU, of its device, at the
    planned batch size; None where it is not predicted.
    """

    spec: Spec
    block: Block
    seed: int
    store: str
    batch_size: int
    threads: int
    device: Literal["cpu", "cuda"]
    predicted_seconds: float
    predicted_bytes: int | None = None
    attempt: int = 1
    generation: int = 0
    bisected: bool = False

    @property
    def name(self) -> str:
        """How the unit is called in messages."""
        spec, samples, draws = self.spec, self.block.samples, self.block.draws
        where = f"samples {samples.start}-{samples.stop - 1}"
        if draws != range(1):
            where += f" draws {draws.start}-{draws.stop - 1}"
        label = f"@{spec.label}" if spec.label else ""
        return f"{spec.checkpoint} {spec.metric}{label}" + (f" {where}" if spec.entry else "")

    def again(self, *, batch_size: int | None = None) -> Task:
        """The next attempt of the same unit."""
        return replace(self, attempt=self.attempt + 1, batch_size=batch_size or self.batch_size)

    def halves(self) -> list[Task]:
        """The unit cut in two, once, where its measurement allows it; else nothing."""
        if self.bisected or self.spec.entry is None:
            return []
        return [
            replace(self, block=half, attempt=1, bisected=True,
                    predicted_seconds=self.predicted_seconds / 2)
            for half in _halved(self.block, self.spec.alignment)
        ]  # fmt: skip


@dataclass(frozen=True)
class Unresolved:
    """A checkpoint or data set that the manifest names and that cannot be had: a row, not a gap."""

    checkpoint: str
    family: str
    tag: str
    reason: str


@dataclass(frozen=True)
class Resolved:
    """All specs a manifest stands for now, and what could not be resolved or is not trained yet."""

    specs: tuple[Spec, ...]
    unresolved: tuple[Unresolved, ...]
    untrained: tuple[TrainedRef, ...]
    files: Mapping[str, tuple[HubFile, ...]] = field(default_factory=dict)  # by lock key


def spec_key(fields: dict[str, Any]) -> str:
    """Key of a spec from the fields that determine its rows."""
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:KEY_DIGITS]


def checkpoint_folder(key: str) -> str:
    """Store key of the folder where a training spec leaves its checkpoint."""
    return f"checkpoints/{key}"


def _halved(block: Block, alignment: int) -> list[Block]:
    """Two blocks of whole draws or whole aligned samples, or nothing if there is one of each."""
    samples, draws = block.samples, block.draws
    if len(draws) > 1:
        middle = draws.start + len(draws) // 2
        return [Block(samples, half) for half in _parted(draws, middle)]
    middle = (samples.start + len(samples) // 2 + alignment - 1) // alignment * alignment
    if not samples.start < middle < samples.stop:
        return []
    return [Block(half, draws) for half in _parted(samples, middle)]


def _parted(whole: range, middle: int) -> tuple[range, range]:
    return range(whole.start, middle), range(middle, whole.stop)
