"""Maximum local sensitivity: our Lanczos against the published code's search, error beside time.

    python tests/benchmarks/bench_mls.py [CHECKPOINT_FOLDER ...]

Without arguments, small ViTs are trained for a minute on Fashion-MNIST (or digits). Every method
measures the same test images with one thread; the truth is the dense Jacobian in float64. Times
are CPU seconds of the process, which are the wall time of one thread on an idle machine. The
published recipe runs one image at a time, as its script does. The self-test, once per network and
the same for all methods, is outside the times.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import oracles

from tasks.block import Block
from tasks.checkpoints import describe_local, load_checkpoint
from tasks.datasets import preprocessing, tensors
from tasks.images import DatasetError, load_dataset
from tasks.measurement import Row, Subject
from tasks.self_test import self_test
from tasks.sensitivity import NormalizedMls

NUM_IMAGES = 16
BATCH_SIZE = 16
REPEATS = 2  # the minimum is kept: neighbours only ever add time, through the shared caches
GREY = {
    "mean": (0.5,),
    "std": (0.5,),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
}
# Image and patch sizes follow the data set: 49 tokens of Fashion-MNIST, 16 of digits.
NETWORKS: dict[str, dict[str, Any]] = {
    "vit_64_x4": {"embed_dim": 64, "depth": 4, "num_heads": 4},
    "vit_96_x6": {"embed_dim": 96, "depth": 6, "num_heads": 6},
    "vit_scaled": {"embed_dim": 64, "depth": 4, "num_heads": 2, "init_values": 0.1},
}


def run(checkpoints: list[Path] | None = None, dataset: str | None = None) -> list[dict[str, Any]]:
    """Measure every network with every method.

    Args:
        checkpoints: Checkpoint folders; None trains the networks above.
        dataset: Where the images come from; None takes Fashion-MNIST where it is installed.

    Returns:
        One dictionary per network and method: seconds per image, ``speedup`` over the published
        recipe, ``forwards`` (seconds in units of one no-grad forward of the same batch), observed
        relative errors of sigma_1 and the certified relative width (NaN without one).
    """
    if dataset is None:
        dataset = "fashion-mnist" if _has_fashion_mnist() else "digits"
    if checkpoints is None:
        networks = [(name, *_trained(settings, dataset)) for name, settings in NETWORKS.items()]
    else:
        networks = [(path.name, *_loaded(path, dataset)) for path in checkpoints]
    return [row for name, model, images in networks for row in _compare(name, model, images)]


def _compare(name: str, model: nn.Module, images: torch.Tensor) -> list[dict[str, Any]]:
    batched = oracles.make_subject(model, images, batch_size=BATCH_SIZE)
    single = oracles.make_subject(model, images, batch_size=1)
    for subject in (batched, single):
        self_test(subject)
    referee = oracles.make_subject(copy.deepcopy(model).double(), images)
    truth = _values(_measure(referee, NormalizedMls(method="dense")))

    methods = {
        "authors, one by one": (single, NormalizedMls(method="authors")),
        "authors, batched": (batched, NormalizedMls(method="authors")),
        "Lanczos 1e-3 certified": (batched, NormalizedMls()),
        "Lanczos 1e-3, one by one": (single, NormalizedMls()),
        "Lanczos 2e-2 certified": (batched, NormalizedMls(tolerance=0.02)),
        "Lanczos, 1 % observed": (batched, _fewest_steps(batched, truth, within=0.01)),
        "power 1e-3": (batched, NormalizedMls(method="power", max_iterations=500)),
        "dense": (batched, NormalizedMls(method="dense")),
    }
    calls: dict[str, Callable[[], Any]] = {
        label: lambda s=subject, m=measurement: _measure(s, m)
        for label, (subject, measurement) in methods.items()
    }
    calls["forward"] = lambda: _forward(model, images)
    seconds = _interleaved_minimum(calls)
    rows = []
    for label, (subject, measurement) in methods.items():
        found = _measure(subject, measurement)
        errors = np.abs(_values(found) / truth - 1)
        widths = [
            float("nan") if row.upper is None or row.lower is None else row.upper - row.lower
            for row in found
        ]
        rows.append(
            {
                "network": name,
                "method": label,
                "seconds_per_image": seconds[label] / len(images),
                "speedup": seconds["authors, one by one"] / seconds[label],
                "forwards": seconds[label] / seconds["forward"],
                "median_error": float(np.median(errors)),
                "max_error": float(errors.max()),
                "certified_width": float(np.max(np.array(widths) / truth)),
                "steps": float(np.median([row.num_iterations for row in found])),
            }
        )
    return rows


def _fewest_steps(subject: Subject, truth: np.ndarray, *, within: float) -> NormalizedMls:
    """The smallest iteration limit at which every image is within the observed error."""
    for steps in range(1, 65):
        settings = NormalizedMls(max_iterations=steps)
        if (np.abs(_values(_measure(subject, settings)) / truth - 1) <= within).all():
            return settings
    raise RuntimeError(f"64 steps do not bring every image within {within}")


def _measure(subject: Subject, measurement: NormalizedMls) -> list[Row]:
    rows = measurement.measure(subject, Block(range(NUM_IMAGES)))
    return [row for row in rows if row.quantity == "mls"]


def _values(rows: list[Row]) -> np.ndarray:
    return np.array([row.value for row in rows])


def _forward(model: nn.Module, images: torch.Tensor) -> None:
    with torch.no_grad():
        for batch in images.split(BATCH_SIZE):
            model(batch)


def _interleaved_minimum(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """CPU seconds of each call: the least of rounds in which all take turns, after a warm-up."""
    best = dict.fromkeys(calls, float("inf"))
    for repeat in range(REPEATS + 1):
        for label, call in calls.items():
            for _ in range(20 if label == "forward" else 1):  # short: more chances to be alone
                started = time.process_time()
                call()
                elapsed = time.process_time() - started
                if repeat:
                    best[label] = min(best[label], elapsed)
    return best


def _trained(settings: dict[str, Any], dataset: str) -> tuple[nn.Module, torch.Tensor]:
    """A ViT trained briefly on 6000 images, and test images."""
    size = 28 if dataset == "fashion-mnist" else 8
    data_config = GREY | {"input_size": (1, size, size)}
    train, test = (load_dataset(dataset, split=split) for split in ("train", "test"))
    images, labels = tensors(train, data_config, indices=range(min(6000, len(train))))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = oracles.tiny_vit(img_size=size, patch_size=max(2, size // 7), **settings).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    order = torch.Generator().manual_seed(0)
    for _ in range(3):
        for index in torch.randperm(len(images), generator=order).split(64):
            targets = nn.functional.one_hot(labels[index], 10).float()
            loss = nn.functional.binary_cross_entropy_with_logits(model(images[index]), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval(), tensors(test, data_config, indices=range(NUM_IMAGES))[0]


def _loaded(path: Path, dataset: str) -> tuple[nn.Module, torch.Tensor]:
    """A checkpoint and test images in the form that it takes."""
    loaded = load_checkpoint(describe_local(path))
    test = load_dataset(dataset, split="test")
    transform = preprocessing(loaded.data_config)
    return loaded.model, torch.stack([transform(test.image(i)) for i in range(NUM_IMAGES)])


def _has_fashion_mnist() -> bool:
    try:
        load_dataset("fashion-mnist", split="test")
    except DatasetError:
        return False
    return True


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", nargs="*", type=Path)
    parser.add_argument("--dataset")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = run(arguments.checkpoints or None, arguments.dataset)
    table = Table("network", "method", title=f"{NUM_IMAGES} images, batch {BATCH_SIZE}, one thread")
    for column in ("ms / image", "speed-up", "forwards", "error median", "max", "width", "steps"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["network"],
            row["method"],
            f"{1e3 * row['seconds_per_image']:.2f}",
            f"{row['speedup']:.1f}",
            f"{row['forwards']:.1f}",
            f"{row['median_error']:.1e}",
            f"{row['max_error']:.1e}",
            f"{row['certified_width']:.1e}",
            f"{row['steps']:.0f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
