"""Device classes: what a plan takes a machine for before units have been measured on it.

Peaks are from the makers' data sheets: dense float32 without TF32, which is what measurements
compute in. ``efficiency`` is the share of the peaks that networks are expected to reach: for the
CPU core measured on this project's own units, for GPUs an estimate that nobody has measured yet, so
its range is wide. Plans use a class and nothing else does; no number and no key depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass

_GIB = 2**30


@dataclass(frozen=True)
class DeviceClass:
    """One kind of device.

    Attributes:
        name: As manifests name it.
        title: As plans call it.
        is_gpu: Whether units run on CUDA.
        flops: Peak float32 operations per second, without TF32; of one core for a CPU.
        bandwidth: Peak bytes per second of its memory.
        memory_bytes: Its memory; None where a machine's own decides.
        seconds_per_operator: What starting one operator costs.
        efficiency: Low, middle and high share of the peaks.
        source: Where the numbers are from.
    """

    name: str
    title: str
    is_gpu: bool
    flops: float
    bandwidth: float
    memory_bytes: int | None
    seconds_per_operator: float
    efficiency: tuple[float, float, float]
    source: str


def _gpu(
    name: str, title: str, teraflops: float, gigabytes_per_second: float, gib: int
) -> DeviceClass:
    return DeviceClass(
        name=name,
        title=title,
        is_gpu=True,
        flops=teraflops * 1e12,
        bandwidth=gigabytes_per_second * 1e9,
        memory_bytes=gib * _GIB,
        seconds_per_operator=1e-5,
        efficiency=(0.2, 0.45, 0.75),
        source="data sheet; efficiency estimated, not measured",
    )


DEVICE_CLASSES = {
    device.name: device
    for device in (
        DeviceClass(
            name="cpu",
            title="CPU core",
            is_gpu=False,
            flops=2.0e11,
            bandwidth=3.0e10,
            memory_bytes=None,
            seconds_per_operator=1.5e-5,
            efficiency=(0.25, 0.6, 1.0),
            source="from units of 8 architectures on a core of an Intel Xeon server, 2026-11",
        ),
        _gpu("h200", "NVIDIA H200 SXM", 67.0, 4800, 141),
        _gpu("h100", "NVIDIA H100 SXM", 67.0, 3350, 80),
        _gpu("h100-pcie", "NVIDIA H100 PCIe", 51.0, 2000, 80),
        _gpu("a100", "NVIDIA A100 80 GB", 19.5, 2000, 80),
        _gpu("a100-40", "NVIDIA A100 40 GB", 19.5, 1555, 40),
        _gpu("l40s", "NVIDIA L40S", 91.6, 864, 48),
        _gpu("l4", "NVIDIA L4", 30.3, 300, 24),
        _gpu("v100", "NVIDIA V100 32 GB", 15.7, 900, 32),
        _gpu("t4", "NVIDIA T4", 8.1, 320, 16),
        _gpu("rtx-6000-ada", "NVIDIA RTX 6000 Ada", 91.1, 960, 48),
        _gpu("rtx-pro-6000", "NVIDIA RTX PRO 6000 Blackwell", 125.0, 1792, 96),
        _gpu("rtx-4090", "NVIDIA GeForce RTX 4090", 82.6, 1008, 24),
    )
}
DEFAULT_CPU, DEFAULT_GPU = "cpu", "a100"


def device_class(name: str | None, *, num_gpus: float) -> DeviceClass:
    """The class that a manifest names, else the default one for its slots."""
    return DEVICE_CLASSES[name or (DEFAULT_GPU if num_gpus else DEFAULT_CPU)]
