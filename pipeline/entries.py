"""What a manifest says, as types: images, resources, checkpoints, measurements, pairs.

They are checked where they are built. Reading a file into them is pipeline/manifest.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pydantic

from pipeline.correlate import CorrelationPair
from pipeline.device_classes import DEVICE_CLASSES
from pipeline.matrix import PairPlot
from tasks.measurement import Measurement, Output, Settings
from tasks.outline import Outline
from tasks.training_settings import TrainSettings


class DataSpec(Settings):
    """Which images. ``samples`` of them are measured, in an order fixed by the manifest's seed."""

    name: Literal["digits", "fashion-mnist", "image-folder", "hub"]
    split: str = "test"
    root: str | None = None
    csv: str | None = None
    repo: str | None = None
    revision: str | None = None
    files: int | None = pydantic.Field(default=None, ge=1)
    image: str = "image"
    label: str = "label"
    labels: Literal["use", "ignore"] = "use"
    samples: int = pydantic.Field(default=100, ge=1)

    @pydantic.model_validator(mode="after")
    def _do_its_keys_fit(self) -> DataSpec:
        if self.name == "image-folder" and self.root is None:
            raise ValueError('image-folder needs root = "the folder of the images"')
        if self.name == "hub" and self.repo is None:
            raise ValueError('hub needs repo = "the repository", as "ILSVRC/imagenet-1k"')
        if self.name in ("digits", "fashion-mnist") and self.split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', found {self.split!r}")
        for owner, keys in _OWN_KEYS.items():
            given = sorted(keys & self.model_fields_set)
            if given and self.name != owner:
                raise ValueError(f"{given[0]} is a key of name = {owner!r}, found {self.name!r}")
        return self


# Keys that only one kind of images has.
_OWN_KEYS = {
    "image-folder": {"csv"},
    "hub": {"repo", "revision", "files", "image", "label"},
}


class ResourceSpec(Settings):
    """What one slot (one worker) may use, and how patient the scheduler is.

    None of this can change a result beyond rounding: it is recorded with every unit, and it stays
    out of the keys.
    """

    num_cpus: int = pydantic.Field(default=1, ge=1)
    num_gpus: float = pydantic.Field(default=0.0, ge=0)
    max_slots: int | None = pydantic.Field(default=None, ge=1)
    batch_size: int = pydantic.Field(default=32, ge=1)
    unit_seconds: float = pydantic.Field(default=60.0, gt=0)
    max_attempts: int = pydantic.Field(default=3, ge=1)
    hang_seconds: float = pydantic.Field(default=120.0, gt=0)
    prefetch: int = pydantic.Field(default=2, ge=0)
    device: str | None = None

    @pydantic.field_validator("num_gpus")
    @classmethod
    def _whole_or_unit_fraction(cls, value: float) -> float:
        # Mixed fractions strand GPU memory and can deadlock the scheduler.
        if value > 1 and value != int(value):
            raise ValueError("above 1, num_gpus must be a whole number")
        if 0 < value < 1 and abs(1 / value - round(1 / value)) > 1e-9:
            raise ValueError("a fraction of a GPU must be 1/k: 0.5, 0.25, ...")
        return value

    @pydantic.model_validator(mode="after")
    def _device_fits(self) -> ResourceSpec:
        if self.device is None:
            return self
        if self.device not in DEVICE_CLASSES:
            known = ", ".join(DEVICE_CLASSES)
            raise ValueError(f"device must be one of {known}, found {self.device!r}")
        if DEVICE_CLASSES[self.device].is_gpu != (self.num_gpus > 0):
            needed = "num_gpus = 1" if self.num_gpus == 0 else "num_gpus = 0"
            raise ValueError(f"device = {self.device!r} needs {needed} or another device")
        return self


@dataclass(frozen=True)
class MeasurementEntry:
    """One ``[[measurements]]`` table: a measurement and the label that tells it from its twins."""

    measurement: Measurement
    label: str

    @property
    def metric(self) -> str:
        """Name of the measurement."""
        return self.measurement.metric

    def series(self, quantity: str) -> str:
        """Name of a quantity in this run's tables: ``quantity`` or ``quantity@label``."""
        return f"{quantity}@{self.label}" if self.label else quantity


@dataclass(frozen=True)
class TrainEntry:
    """One checkpoint to train: a point of a ``[[train]]`` table's grid."""

    name: str
    family: str
    data: DataSpec
    settings: TrainSettings


class TimmModel(Settings):
    """A pretrained checkpoint with what is known of it: what timm builds must agree."""

    name: str
    family: str | None = None
    tag: str | None = None
    input_size: int | None = pydantic.Field(default=None, ge=1)
    parameters: int | None = pydantic.Field(default=None, ge=1)

    @pydantic.model_validator(mode="after")
    def _tag_of_the_name(self) -> TimmModel:
        if "." not in self.name:
            raise ValueError(f"name must be timm's full name with its tag, found {self.name!r}")
        if self.tag is not None and self.name.partition(".")[2] != self.tag:
            raise ValueError(f"tag {self.tag!r} is not the tag of {self.name!r}")
        return self

    def mismatch(self, network: Outline) -> str:
        """How the network differs from what is known of it; empty if it does not."""
        built = {
            "input_size": network.data_config["input_size"][-1],
            "parameters": network.num_parameters,
        }
        wrong = [
            f"{key} {built[key]} instead of {expected}"
            for key in built
            if (expected := getattr(self, key)) not in (None, built[key])
        ]
        return ", ".join(wrong)


class TimmEntry(Settings):
    """Pretrained checkpoints from the hub, by timm's full names: bare, or tables in ``models``.

    ``names`` has both.
    """

    source: Literal["timm"]
    names: list[str] = pydantic.Field(min_length=1)
    models: list[TimmModel] = pydantic.Field(default_factory=list)
    revision: str | None = None
    family: str | None = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _names_of_the_models(cls, data: Any) -> Any:
        models = data.get("models") if isinstance(data, dict) else None
        if not isinstance(models, list):
            return data
        named = [model["name"] for model in models if isinstance(model, dict) and "name" in model]
        return {**data, "names": [*data.get("names", ()), *named]}

    def family_of(self, name: str) -> str | None:
        """The group that the manifest puts a checkpoint in, if it does."""
        known = (model.family for model in self.models if model.name == name)
        return self.family or next(known, None)


class LocalEntry(Settings):
    """Checkpoint directories (config.json and weights), by path or glob."""

    source: Literal["local"]
    paths: list[str] = pydantic.Field(min_length=1)
    family: str | None = None


@dataclass(frozen=True)
class Manifest:
    """A validated manifest. ``root`` is the folder its relative paths start from."""

    name: str
    seed: int
    output: Output
    dtype: Literal["float32", "float64"]
    data: DataSpec
    train: tuple[TrainEntry, ...]
    timm: tuple[TimmEntry, ...]
    local: tuple[tuple[LocalEntry, tuple[Path, ...]], ...]
    measurements: tuple[MeasurementEntry, ...]
    correlations: tuple[CorrelationPair, ...]
    pair_plot: PairPlot | None
    resources: ResourceSpec
    root: Path
    text: str
    lock_path: Path | None = None  # of the file that it was read from

    @property
    def itemsize(self) -> int:
        """Bytes of a number in ``dtype``."""
        return 8 if self.dtype == "float64" else 4
