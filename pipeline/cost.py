"""Predicted seconds of units: their work (``tasks.work``) by the rates of a device.

Nominal rates are those of the manifest's device class, and they alone decide how units are cut: a
cut must not move when a run learns how fast its machines are. What a plan says and what the
progress bar shows rest on calibrated rates (pipeline/calibration.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.device_classes import DeviceClass, device_class
from pipeline.entries import ResourceSpec
from pipeline.specs import Spec
from tasks.block import Block
from tasks.work import Work, images_at_once, peak_bytes, self_test_work, unit_work

TRAINING_FORWARDS = 3.0  # a training step in forwards of its batch
# An operator reads about two tensors of the size that it writes; chosen.
TRAFFIC = 3.0
SECONDS_PER_UNIT = 0.05  # rows, shard and record; measured with `make bench`
SECONDS_PER_IMAGE = 5e-3  # decoding and resizing a photograph on a core; chosen
PROCESS_BYTES = 1.1e9  # torch, timm and workspaces beside networks; measured on a CPU
LOAD_SECONDS, LOAD_RATE = 1.0, 2e8  # building a network; reading, checking and copying its weights


@dataclass(frozen=True)
class Rates:
    """What work costs on one device: seconds per operation, byte written, operator and unit."""

    flop: float
    byte: float
    operator: float
    unit: float

    def seconds(self, work: Work, *, num_images: int = 0, share: float = 1.0) -> float:
        """Seconds of some work.

        Args:
            work: What is done.
            num_images: Images that are read for it.
            share: CPU cores of a slot, or its part of a GPU.
        """
        computing = self.flop * work.flops + self.byte * work.num_bytes
        fixed = self.unit + num_images * SECONDS_PER_IMAGE
        return computing / share + self.operator * work.operators + fixed


def nominal_rates(device: DeviceClass, *, efficiency: float | None = None) -> Rates:
    """Rates of a device class at its middle efficiency, or at another one."""
    reached = device.efficiency[1] if efficiency is None else efficiency
    return Rates(
        flop=1 / (device.flops * reached),
        byte=TRAFFIC / (device.bandwidth * reached),
        operator=device.seconds_per_operator,
        unit=SECONDS_PER_UNIT,
    )


def slot_device(resources: ResourceSpec) -> DeviceClass:
    """The class that a manifest's slots are taken for."""
    return device_class(resources.device, num_gpus=resources.num_gpus)


def slot_share(resources: ResourceSpec) -> float:
    """Cores of a slot, or its part of a GPU: a unit uses one GPU however many a slot has."""
    return min(1.0, resources.num_gpus) if resources.num_gpus > 0 else float(resources.num_cpus)


def block_work(spec: Spec, block: Block, batch_size: int) -> Work:
    """Work of a unit, or of a whole training."""
    if spec.train is not None:
        settings, network = spec.train.settings, spec.network
        images = settings.steps * settings.batch_size * TRAINING_FORWARDS
        return Work(
            flops=images * network.forward_flops,
            num_bytes=images * network.operator_bytes,
            operators=settings.steps * TRAINING_FORWARDS * network.num_operators,
        )
    assert spec.entry is not None
    return unit_work(
        spec.entry.measurement, spec.network, num_samples=len(block.samples),
        num_draws=len(block.draws), batch_size=batch_size,
    )  # fmt: skip


def set_up_work(spec: Spec) -> Work:
    """Work of the self-test, which the first unit of a loaded network does."""
    return Work() if spec.entry is None else self_test_work(spec.entry.measurement, spec.network)


def load_seconds(spec: Spec) -> float:
    """Seconds for building a network and reading its weights from a disk."""
    return 0.0 if spec.ref is None else LOAD_SECONDS + spec.network.weight_bytes / LOAD_RATE


def unit_bytes(spec: Spec, batch_size: int, itemsize: int) -> int | None:
    """Predicted peak memory of a unit's process or, on a GPU, of its device; None for trainings."""
    if spec.entry is None:
        return None
    needed = peak_bytes(
        spec.entry.measurement, spec.network, batch_size=batch_size, itemsize=itemsize
    )
    return int(PROCESS_BYTES + needed)


def seconds_per_index(spec: Spec, resources: ResourceSpec) -> float:
    """Nominal seconds of one image and draw, as part of a whole batch; or of a whole training.

    A function of the manifest alone: it decides how units are cut.
    """
    rates, share = nominal_rates(slot_device(resources)), slot_share(resources)
    if spec.entry is None:
        return rates.seconds(block_work(spec, Block(range(1)), 1), share=share)
    size = resources.batch_size
    batch = images_at_once(spec.entry.measurement, batch_size=size, num_samples=size)
    work = block_work(spec, Block(range(batch)), size)
    return rates.seconds(work, num_images=batch, share=share) / batch
