import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from tasks import images as images_module
from tasks.datasets import (
    DatasetError,
    load_batch,
    load_dataset,
    preprocessing,
    sample_order,
    tensors,
    transform_identity,
)
from tasks.idx import read_idx, write_idx
from tasks.images import ImageDataset


def config(channels: int = 1, size: int = 8, **changes: object) -> dict[str, object]:
    return {
        "input_size": (channels, size, size),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": (0.485, 0.456, 0.406)[:channels],
        "std": (0.229, 0.224, 0.225)[:channels],
    } | changes


def write_fashion_mnist(folder: Path, n: int = 6, suffix: str = "") -> tuple[np.ndarray, Path]:
    pixels = np.random.default_rng(0).integers(0, 256, (n, 28, 28), np.uint8)
    write_idx(folder / f"train-images-idx3-ubyte{suffix}", pixels)
    write_idx(folder / f"train-labels-idx1-ubyte{suffix}", np.arange(n, dtype=np.uint8))
    return pixels, folder / f"train-images-idx3-ubyte{suffix}"


def write_folder(root: Path, names: dict[str, int] | None = None) -> Path:
    rng = np.random.default_rng(1)
    for name, n in (names or {"ant": 2, "bee": 3}).items():
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(rng.integers(0, 256, (10, 12, 3), np.uint8)).save(
                root / name / f"{i}.png"
            )
    return root


def test_digits_splits_partition_the_published_images() -> None:
    train, test = (load_dataset("digits", split=split) for split in ("train", "test"))
    assert (len(train), len(test), test.num_classes) == (1297, 500, 10)
    published = sorted(
        i.tobytes() for i in (load_digits().images * (255 / 16)).round().astype("u1")
    )
    assert isinstance(train.images, np.ndarray)
    assert isinstance(test.images, np.ndarray)
    assert sorted(i.tobytes() for part in (train, test) for i in part.images) == published


def test_digits_keep_their_labels_and_use_the_whole_range_of_grey() -> None:
    test = load_dataset("digits", split="test")
    published = {
        image.tobytes(): label
        for image, label in zip(load_digits().images, load_digits().target, strict=True)
    }
    assert isinstance(test.images, np.ndarray)
    for i in range(len(test)):
        sixteenths = np.rint(test.images[i] * (16 / 255)).astype(float)
        assert published[sixteenths.tobytes()] == test.label(i)
    assert (test.images.min(), test.images.max()) == (0, 255)


def test_identities_tell_splits_pixels_and_labels_apart() -> None:
    test = load_dataset("digits", split="test")
    assert isinstance(test.images, np.ndarray)
    pixels, labels = test.images.copy(), test.labels.copy()
    pixels[7, 3, 3] ^= 1
    labels[7] = (labels[7] + 1) % 10
    variants = [
        test,
        load_dataset("digits", split="train"),
        ImageDataset("digits", None, pixels, test.labels, test.class_names),
        ImageDataset("digits", None, test.images, labels, test.class_names),
    ]
    assert len({variant.identity() for variant in variants}) == 4
    assert load_dataset("digits", split="test").identity() == test.identity()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fashion_mnist_is_read_from_idx_files(tmp_path: Path, suffix: str) -> None:
    pixels, _ = write_fashion_mnist(tmp_path, suffix=suffix)
    dataset = load_dataset("fashion-mnist", split="train", root=tmp_path)
    assert np.array_equal(dataset.images, pixels)
    assert dataset.labels.tolist() == list(range(6))
    assert dataset.class_names[dataset.label(5)] == "Sandal"


def test_fashion_mnist_is_found_through_its_environment_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_fashion_mnist(tmp_path)
    monkeypatch.setenv("FLATCENSUS_FASHION_MNIST", str(tmp_path))
    assert len(load_dataset("fashion-mnist", split="train")) == 6


def test_missing_fashion_mnist_says_where_it_looked_and_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLATCENSUS_FASHION_MNIST", raising=False)
    monkeypatch.setattr(images_module, "FASHION_MNIST_PLACES", (tmp_path / "a", tmp_path / "b"))
    with pytest.raises(DatasetError, match="dataset-fashion-mnist") as error:
        load_dataset("fashion-mnist", split="test")
    assert all(str(tmp_path / place) in str(error.value) for place in "ab")


def test_a_truncated_idx_file_is_named_with_both_sizes(tmp_path: Path) -> None:
    _, path = write_fashion_mnist(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DatasetError, match=rf"{path}: expected {16 + 6 * 784} bytes .* found 4620"):
        load_dataset("fashion-mnist", split="train", root=tmp_path)


def test_a_truncated_gzip_file_is_named(tmp_path: Path) -> None:
    _, path = write_fashion_mnist(tmp_path, suffix=".gz")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DatasetError, match=rf"{path}: .* ends after 1000 bytes"):
        read_idx(path, ndim=3)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "found 0x\\."),
        (b"\x00\x00\x08\x01\x00\x00\x00\x05hello", "found 0x00000801"),
        (b"\x00\x00\x08\x03\x00\x00", "found 6"),
        (b"GIF89a", "found 0x47494638"),
    ],
)
def test_files_that_are_no_idx_images_are_refused(
    tmp_path: Path, content: bytes, text: str
) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=text):
        read_idx(path, ndim=3)


def test_a_file_that_is_not_gzip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gz").write_bytes(b"<html>not found</html>")
    with pytest.raises(DatasetError, match="does not decompress"):
        read_idx(tmp_path / "x.gz", ndim=1)


def test_idx_files_have_the_bytes_of_the_format(tmp_path: Path) -> None:
    write_idx(tmp_path / "x.gz", np.array([[1, 2, 3], [4, 5, 6]], np.uint8))
    expected = bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 6])
    assert gzip.decompress((tmp_path / "x.gz").read_bytes()) == expected


def test_images_and_labels_must_be_equally_many(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(5, np.uint8))
    with pytest.raises(DatasetError, match=r"6 images but .* 5 labels"):
        load_dataset("fashion-mnist", split="train", root=tmp_path)


def test_class_folders_become_labels_in_the_order_of_their_names(tmp_path: Path) -> None:
    dataset = load_dataset("image-folder", split="val", root=write_folder(tmp_path / "val").parent)
    assert dataset.class_names == ("ant", "bee")
    assert dataset.labels.tolist() == [0, 0, 1, 1, 1]
    assert (dataset.image(0).size, dataset.image(0).mode) == ((12, 10), "RGB")
    direct = load_dataset("image-folder", split="val", root=tmp_path / "val")
    assert direct.identity() == dataset.identity()


def test_a_folders_identity_sees_contents_and_names(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    before = load_dataset("image-folder", split="all", root=root).identity()
    (root / "ant/0.png").rename(root / "ant/9.png")
    renamed = load_dataset("image-folder", split="all", root=root).identity()
    (root / "ant/9.png").write_bytes((root / "ant/1.png").read_bytes())
    replaced = load_dataset("image-folder", split="all", root=root).identity()
    assert len({before, renamed, replaced}) == 3


def test_an_absent_split_is_refused_instead_of_reading_splits_as_classes(tmp_path: Path) -> None:
    write_folder(tmp_path / "train")
    with pytest.raises(DatasetError, match="no split 'test', found: train"):
        load_dataset("image-folder", split="test", root=tmp_path)


def test_folder_problems_name_the_place(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no class folders"):
        load_dataset("image-folder", split="all", root=tmp_path)
    root = write_folder(tmp_path)
    (root / "cow").mkdir()
    with pytest.raises(DatasetError, match=f"{root / 'cow'}: empty"):
        load_dataset("image-folder", split="all", root=root)
    (root / "cow/notes.txt").write_text("moo")
    with pytest.raises(DatasetError, match=f"{root / 'cow/notes.txt'}: not an image"):
        load_dataset("image-folder", split="all", root=root)
    with pytest.raises(DatasetError, match="needs root"):
        load_dataset("image-folder", split="all", root=tmp_path / "absent")


def test_an_unreadable_image_is_named_when_it_is_asked_for(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    content = (root / "bee/1.png").read_bytes()
    (root / "bee/1.png").write_bytes(content[: len(content) // 2])
    (root / "bee/2.png").write_bytes(b"no image")
    dataset = load_dataset("image-folder", split="all", root=root)
    for i, name in ((3, "bee/1.png"), (4, "bee/2.png")):
        with pytest.raises(DatasetError, match=f"{root / name}: expected a readable image"):
            dataset.image(i)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("L", "L"), ("1", "L"), ("LA", "L"), ("P", "RGB"), ("RGBA", "RGB"), ("RGB", "RGB")],
)
def test_image_modes_become_grey_or_rgb(tmp_path: Path, mode: str, expected: str) -> None:
    (tmp_path / "ant").mkdir()
    Image.new(mode, (4, 4)).save(tmp_path / "ant/0.png")
    assert load_dataset("image-folder", split="all", root=tmp_path).image(0).mode == expected


def test_sixteen_bit_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "ant").mkdir()
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "ant/0.png")
    with pytest.raises(DatasetError, match="expected 8 bits per channel"):
        load_dataset("image-folder", split="all", root=tmp_path).image(0)


def test_unknown_data_sets_and_splits_are_refused() -> None:
    with pytest.raises(DatasetError, match="unknown data set 'mnist'"):
        load_dataset("mnist", split="train")
    with pytest.raises(DatasetError, match="split = 'val'"):
        load_dataset("digits", split="val")


def test_the_sample_order_is_a_permutation_that_never_changes() -> None:
    order = sample_order("identity", seed=3, length=1000)
    assert sorted(order.tolist()) == list(range(1000))
    # Frozen: other values would silently measure other images in old runs.
    assert order[:6].tolist() == FROZEN_ORDER
    assert sample_order("identity", seed=4, length=1000)[:6].tolist() != FROZEN_ORDER
    assert sample_order("other", seed=3, length=1000)[:6].tolist() != FROZEN_ORDER


FROZEN_ORDER = [516, 656, 428, 132, 84, 143]


def test_a_longer_data_set_keeps_the_order_of_its_first_images() -> None:
    long = sample_order("identity", seed=0, length=300)
    assert long[long < 100].tolist() == sample_order("identity", seed=0, length=100).tolist()


def test_the_sample_order_is_uniform() -> None:
    """Mean position of image 0 over seeds: uniform on 0..9 has mean 4.5, variance 8.25."""
    positions = [
        sample_order("identity", seed=seed, length=10).tolist().index(0) for seed in range(2000)
    ]
    assert abs(np.mean(positions) - 4.5) < 4 * np.sqrt(8.25 / 2000)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("crop_mode", ["center", "border", "squash"])
def test_the_fast_path_equals_timms_transform_bit_for_bit(channels: int, crop_mode: str) -> None:
    dataset = load_dataset("digits", split="test")
    settings = config(channels, crop_mode=crop_mode)
    transform = preprocessing(settings)
    inputs, labels = tensors(dataset, settings)
    assert inputs.dtype == torch.float32
    assert torch.equal(inputs, torch.stack([transform(dataset.image(i)) for i in range(500)]))
    assert labels.tolist() == dataset.labels.tolist()


def test_images_of_another_size_go_through_timms_transform() -> None:
    dataset = load_dataset("digits", split="test")
    for settings in (config(size=12), config(crop_pct=0.5)):
        transform = preprocessing(settings)
        inputs, labels = tensors(dataset, settings, indices=[4, 2])
        assert torch.equal(inputs, torch.stack([transform(dataset.image(i)) for i in (4, 2)]))
        assert labels.tolist() == [dataset.label(4), dataset.label(2)]


def test_preprocessing_normalises_each_channel_of_the_right_colours() -> None:
    image = Image.new("RGB", (8, 8), (255, 0, 51))
    values = preprocessing(config(3))(image)[:, 0, 0].double().numpy()
    expected = (np.array([1, 0, 0.2]) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(values, expected, rtol=1e-6)  # float32
    grey = preprocessing(config(1))(image)
    assert grey.shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"input_size": (4, 8, 8)}, "images do not fit.*1 .grey. or 3 .RGB."),
        ({"mean": (0.5, 0.5, 0.5)}, "mean has 3 values"),
        ({"std": ()}, "std has 0 values"),
    ],
)
def test_contradictory_data_configurations_are_refused(
    changes: dict[str, object], text: str
) -> None:
    with pytest.raises(DatasetError, match=text):
        preprocessing(config(1, **changes))


def test_a_missing_field_of_the_data_configuration_is_named() -> None:
    settings = config()
    del settings["std"]
    with pytest.raises(DatasetError, match=r"lacks .'std'."):
        preprocessing(settings)


def test_the_transform_identity_is_canonical_and_sees_every_field() -> None:
    listed = config(mean=[0.485], std=[0.229], input_size=[1, 8, 8], fixed_input_size=True)
    assert transform_identity(listed) == transform_identity(config())
    changes = {
        "input_size": (1, 9, 8), "interpolation": "bilinear", "crop_pct": 0.9,
        "crop_mode": "squash", "mean": (0.4,), "std": (0.2,),
    }  # fmt: skip
    for name, value in changes.items():
        assert transform_identity(config(**{name: value})) != transform_identity(config())


def test_a_batch_holds_the_images_at_the_positions_of_the_order() -> None:
    dataset = load_dataset("digits", split="test")
    order = sample_order(dataset.identity(), seed=0, length=len(dataset))
    transform = preprocessing(config())
    batch = load_batch(
        dataset, [5, 2], order=order, transform=transform, num_outputs=12, dtype=torch.float64
    )
    for row, sample in enumerate((5, 2)):
        image = int(order[sample])
        assert torch.equal(batch.inputs[row], transform(dataset.image(image)).double())
        assert batch.targets[row].nonzero().item() == dataset.label(image)
        assert batch.targets[row].sum() == 1
    assert (batch.samples, batch.targets.dtype) == ((5, 2), torch.float64)


def test_a_label_beyond_the_networks_outputs_is_named() -> None:
    dataset = load_dataset("digits", split="test")
    with pytest.raises(DatasetError, match=r"label 9 .'9'., but the network has 9 outputs"):
        load_batch(
            dataset,
            range(100),
            order=np.arange(500),
            transform=preprocessing(config()),
            num_outputs=9,
        )


def batch_of(dataset: ImageDataset, num_outputs: int, **options: object):
    return load_batch(
        dataset, range(len(dataset)), order=np.arange(len(dataset)),
        transform=preprocessing(config()), num_outputs=num_outputs, **options,  # type: ignore[arg-type]
    )  # fmt: skip


def test_targets_are_where_the_label_map_says() -> None:
    images = np.zeros((3, 8, 8), np.uint8)
    dataset = ImageDataset("x", None, images, np.array([1, 0, 1]), ("ant", "bee"))
    assert batch_of(dataset, 9, label_map=(7, 4)).targets.argmax(1).tolist() == [4, 7, 4]
    assert batch_of(dataset, 9).targets.argmax(1).tolist() == [1, 0, 1]
    assert batch_of(dataset, 9, with_labels=False).targets.isnan().all()


@pytest.mark.parametrize("label", [-1, 2])
def test_labels_that_are_no_class_of_the_data_are_named(label: int) -> None:
    """As in a test split without labels, where every label is -1."""
    images = np.zeros((2, 8, 8), np.uint8)
    dataset = ImageDataset("x", None, images, np.array([0, label]), ("ant", "bee"))
    with pytest.raises(DatasetError, match=f"x has label {label}, but its classes are 0 to 1"):
        batch_of(dataset, 9)
    with pytest.raises(DatasetError, match=f"x has label {label}, but its classes are 0 to 1"):
        batch_of(dataset, 9, label_map=(0, 1))
    assert batch_of(dataset, 9, with_labels=False).targets.isnan().all()
