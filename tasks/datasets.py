"""Images as measurements and training take them: a frozen order, preprocessing, batches.

The preprocessing is the evaluation transform that timm gives the checkpoint; nothing is augmented.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform

from tasks.idx import DatasetError
from tasks.images import DATASETS, TRAINING_SPLIT, ImageDataset, load_dataset
from tasks.measurement import Batch

__all__ = [
    "DATASETS",
    "TRAINING_SPLIT",
    "DatasetError",
    "ImageDataset",
    "load_batch",
    "load_dataset",
    "preprocessing",
    "sample_order",
    "tensors",
    "transform_identity",
]

Transform = Callable[[Image.Image], torch.Tensor]


def sample_order(identity: str, *, seed: int, length: int) -> np.ndarray:
    """Seeded order of a data set: positions in it are what measurements call samples.

    Images are sorted by a hash of (identity, seed, index). So the order does not depend on a
    library's generator, and the first n images are part of the first n + 1.

    Args:
        identity: ``ImageDataset.identity()``.
        seed: The manifest's seed.
        length: Number of images in the data set.

    Returns:
        Permutation of ``range(length)``, int64.
    """
    prefix = hashlib.blake2b(f"{identity}\0{seed}\0".encode(), digest_size=8)
    digests = bytearray()
    for index in range(length):
        digest = prefix.copy()
        digest.update(str(index).encode())
        digests += digest.digest()
    return np.argsort(np.frombuffer(bytes(digests), "<u8"), kind="stable")


def preprocessing(data_config: Mapping[str, Any]) -> Transform:
    """Build the evaluation transform that timm would use for a checkpoint.

    Args:
        data_config: ``input_size``, ``interpolation``, ``crop_pct``, ``crop_mode``, ``mean`` and
            ``std``, as ``timm.data.resolve_model_data_config`` gives them.

    Returns:
        Function from an image to a float32 tensor (C, H, W). Images are converted to grey for one
        input channel and to RGB for three.

    Raises:
        DatasetError: For another number of channels, or statistics that do not fit them.
    """
    config = transform_identity(data_config)
    mode = "L" if config["input_size"][0] == 1 else "RGB"
    transform: Any = create_transform(**config, is_training=False)

    def apply(image: Image.Image) -> torch.Tensor:
        return transform(image if image.mode == mode else image.convert(mode))

    return apply


def transform_identity(data_config: Mapping[str, Any]) -> dict[str, Any]:
    """Reduce a data configuration to the fields that determine pixels, in a form for keys.

    Raises:
        DatasetError: If a field is missing or the fields contradict each other.
    """
    names = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
    missing = [name for name in names if name not in data_config]
    if missing:
        raise DatasetError(
            f"the checkpoint's data configuration lacks {missing}. "
            "Add them to pretrained_cfg in its config.json."
        )
    size = [int(n) for n in data_config["input_size"]]
    if len(size) != 3 or size[0] not in (1, 3):
        raise DatasetError(
            f"images do not fit: the network expects input_size {size} (channels, height, width), "
            "but images have 1 (grey) or 3 (RGB) channels."
        )
    for name in ("mean", "std"):
        if len(data_config[name]) != size[0]:
            raise DatasetError(
                f"{name} has {len(data_config[name])} values, but input_size {size} has {size[0]} "
                "channels. Correct pretrained_cfg in the checkpoint's config.json."
            )
    return {
        "input_size": size,
        "interpolation": str(data_config["interpolation"]),
        "crop_pct": float(data_config["crop_pct"]),
        "crop_mode": str(data_config["crop_mode"]),
        "mean": [float(v) for v in data_config["mean"]],
        "std": [float(v) for v in data_config["std"]],
    }


def tensors(
    dataset: ImageDataset,
    data_config: Mapping[str, Any],
    *,
    indices: Sequence[int] | np.ndarray | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Preprocess many images at once, for training.

    Equal to ``preprocessing`` bit for bit; where no pixel moves, without the detour over PIL.

    Args:
        dataset: Where the images come from.
        data_config: See ``preprocessing``.
        indices: Which images, in this order; None for all.

    Returns:
        Inputs (N, C, H, W) float32 and labels (N,) int64.
    """
    chosen = np.arange(len(dataset)) if indices is None else np.asarray(indices, np.int64)
    labels = torch.from_numpy(dataset.labels[chosen].astype(np.int64))
    config = transform_identity(data_config)
    transform = preprocessing(config)
    pixels, size = dataset.images, config["input_size"]
    in_place = isinstance(pixels, np.ndarray) and list(pixels.shape[1:]) == size[1:]
    if not in_place or config["crop_pct"] != 1.0:
        return torch.stack([transform(dataset.image(int(i))) for i in chosen]), labels
    assert isinstance(pixels, np.ndarray)
    grey = torch.from_numpy(pixels[chosen])[:, None].float().div_(255)
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return grey.expand(-1, size[0], -1, -1).sub(mean).div_(std), labels


def load_batch(
    dataset: ImageDataset,
    samples: Sequence[int],
    *,
    order: np.ndarray,
    transform: Transform,
    num_outputs: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    label_map: Sequence[int] | None = None,
    with_labels: bool = True,
) -> Batch:
    """Load the images at these positions of the frozen order.

    Args:
        dataset: Where the images come from.
        samples: Positions in ``order``.
        order: Result of ``sample_order``.
        transform: Result of ``preprocessing``.
        num_outputs: Number of outputs of the network: length of the one-hot targets.
        dtype: Of inputs and targets.
        device: Of inputs and targets.
        label_map: Output of the network for each class of the data; None where they are the same.
        with_labels: Whether labels are read. If not, all targets are NaN: a number that used them
            shows.

    Raises:
        DatasetError: If an image cannot be read or its label exceeds the network's outputs.
    """
    indices = [int(order[sample]) for sample in samples]
    if with_labels:
        targets = _one_hot([dataset.label(i) for i in indices], dataset, num_outputs, label_map)
    else:
        targets = torch.full((len(indices), num_outputs), torch.nan)
    inputs = torch.stack([transform(dataset.image(i)) for i in indices])
    return Batch(inputs.to(device, dtype), targets.to(device, dtype), tuple(map(int, samples)))


def _one_hot(
    labels: Sequence[int],
    dataset: ImageDataset,
    num_outputs: int,
    label_map: Sequence[int] | None,
) -> torch.Tensor:
    foreign = [label for label in labels if not 0 <= label < dataset.num_classes]
    if foreign:
        raise DatasetError(
            f"{dataset.name} has label {foreign[0]}, but its classes are 0 to "
            f"{dataset.num_classes - 1}. Images without labels are measured with labels = "
            '"ignore", without what needs labels.'
        )
    if label_map is not None:
        labels = [label_map[label] for label in labels]
    elif max(labels) >= num_outputs:
        raise DatasetError(
            f"{dataset.name} has label {max(labels)} ({dataset.class_names[max(labels)]!r}), but "
            f"the network has {num_outputs} outputs (labels 0 to {num_outputs - 1}). Choose data "
            "with the network's classes, or a checkpoint trained on these."
        )
    return torch.nn.functional.one_hot(torch.tensor(labels), num_outputs)
