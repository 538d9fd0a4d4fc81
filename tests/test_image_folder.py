"""Folders of images: CSV lists, contents remembered and checked, files as timm decodes them."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data.dataset import ImageDataset as TimmDataset

from tasks import file_digests
from tasks.datasets import load_dataset, preprocessing
from tasks.decoding import decode
from tasks.file_digests import content_digests, forget
from tasks.idx import DatasetError

PHOTOGRAPHS = [Image.fromarray(image[:120, :160]) for image in load_sample_images().images]


def save(image: Image.Image, path: Path, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """ILSVRC's own layout of the validation images: one folder, and a list of labels elsewhere."""
    for i in range(4):
        save(PHOTOGRAPHS[i % 2], tmp_path / f"val/ILSVRC2012_val_{i + 1:08d}.JPEG", quality=60 + i)
    return tmp_path


def listed(folder: Path, text: str, *, with_labels: bool = True):
    (folder / "val.csv").write_text(text, encoding="utf-8")
    return load_dataset(
        "image-folder", split="val", root=folder / "val", csv=folder / "val.csv",
        with_labels=with_labels,
    )  # fmt: skip


def test_a_csv_chooses_images_and_labels_in_its_order(flat: Path):
    dataset = listed(
        flat,
        "width,file,label\n1,ILSVRC2012_val_00000003.JPEG,n11939491\n"
        "2,ILSVRC2012_val_00000001.JPEG,n03877845\n",
    )
    assert dataset.class_names == ("n03877845", "n11939491")
    assert dataset.labels.tolist() == [1, 0]
    with Image.open(flat / "val/ILSVRC2012_val_00000003.JPEG") as expected:
        assert np.array_equal(np.asarray(dataset.image(0)), np.asarray(expected))


def test_integer_labels_are_classes_in_the_order_of_their_values(flat: Path):
    names = [f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(3)]
    rows = "".join(f"{name},{label}\n" for name, label in zip(names, (10, 2, 10), strict=True))
    dataset = listed(flat, "\ufefffile,label\n" + rows)  # as spreadsheets write UTF-8
    assert dataset.class_names == ("2", "10")
    assert dataset.labels.tolist() == [1, 0, 1]


def test_without_labels_a_csv_needs_none(flat: Path):
    text = "file\nILSVRC2012_val_00000002.JPEG\n"
    dataset = listed(flat, text, with_labels=False)
    assert (dataset.labels.tolist(), dataset.class_names) == ([-1], ())
    with pytest.raises(DatasetError, match=r"val.csv:1: expected a header with .* found file\."):
        listed(flat, text)


def test_all_problems_of_a_csv_are_named_with_their_lines(flat: Path):
    save(PHOTOGRAPHS[0], flat / "secret.png")
    (flat / "val/notes.txt").write_text("no image")
    with pytest.raises(DatasetError) as caught:
        listed(
            flat,
            "file,label\nILSVRC2012_val_00000001.JPEG,a\nILSVRC2012_val_00000009.JPEG,a\n"
            "ILSVRC2012_val_00000001.JPEG,b\n../secret.png,a\nnotes.txt,a\n"
            "ILSVRC2012_val_00000002.JPEG,\n,a\nILSVRC2012_val_00000003.JPEG,c\n"
            "ILSVRC2012_val_00000004.JPEG,maillot, tank suit\n",
        )
    problems = str(caught.value).splitlines()
    assert [line.removeprefix(f"{flat}/val.csv:").partition(":")[0] for line in problems] == [
        "3", "4", "5", "6", "7", "8", "10",
    ]  # fmt: skip
    for line, words in zip(
        problems,
        ("is not in", "listed in line 2 already", "a plain path below", "no image by its name",
         "label is empty", "file is empty", "quote a label with a comma"),
        strict=True,
    ):  # fmt: skip
        assert words in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "found nothing"),
        (b"file,label\n", "lists no images"),
        (b"ImageId,Prediction\nx,y\n", "found ImageId, Prediction"),
        (b"file,label\n\xff\xfe,a\n", "expected a CSV in UTF-8"),
        (b'file,label\n"a.png,a\n', "expected a CSV"),
    ],
)
def test_files_that_are_no_list_are_refused(flat: Path, content: bytes, words: str):
    (flat / "val.csv").write_bytes(content)
    with pytest.raises(DatasetError, match=words):
        load_dataset("image-folder", split="x", root=flat / "val", csv=flat / "val.csv")
    with pytest.raises(DatasetError, match=r"none.csv: expected a CSV in UTF-8, but .* No such"):
        load_dataset("image-folder", split="x", root=flat / "val", csv=flat / "none.csv")


def test_a_flat_folder_without_a_list_says_what_to_do(flat: Path):
    with pytest.raises(DatasetError, match=r'no class folders.*csv = "labels.csv"'):
        load_dataset("image-folder", split="val", root=flat)


def test_images_beside_class_folders_are_not_left_out_silently(tmp_path: Path):
    save(PHOTOGRAPHS[0], tmp_path / "n03877845/a.png")
    save(PHOTOGRAPHS[1], tmp_path / "b.png")
    with pytest.raises(
        DatasetError, match=r"1 images lie beside the class folders, such as b\.png"
    ):
        load_dataset("image-folder", split="val", root=tmp_path)


def test_ilsvrcs_own_folders_are_read(tmp_path: Path):
    for split in ("train", "val"):
        for name in ("n11939491", "n03877845"):
            save(PHOTOGRAPHS[0], tmp_path / split / name / f"ILSVRC2012_{split}_00000001.JPEG")
    dataset = load_dataset("image-folder", split="val", root=tmp_path)
    assert dataset.class_names == ("n03877845", "n11939491")
    assert dataset.root == tmp_path / "val"


def test_an_identity_has_not_changed_since_it_was_first_recorded(tmp_path: Path):
    """Keys of stored results rest on it: names in folders sort part by part, as paths do."""
    for i, name in enumerate(("b/x.pgm", "b/sub/x.pgm", "b/sub-a/x.pgm", "a/.hidden/x.pgm")):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"P5 2 2 255\n" + bytes([i] * 4))
    (tmp_path / "a/.hidden.pgm").write_bytes(b"skipped")
    dataset = load_dataset("image-folder", split="test", root=tmp_path)
    # Computed by commit 3685a2d, which read every byte each time.
    assert dataset.identity() == RECORDED_IDENTITY


RECORDED_IDENTITY = "9ab5fdc5dd52a17134085e4fff28477858676025eeef894eafdd5ba5393d7f4f"


def decoded_by_timm(path: Path) -> Image.Image:
    class Reader:
        def __getitem__(self, index: int):
            return io.BytesIO(path.read_bytes()), 0

        def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
            return path.name

    return TimmDataset("", reader=Reader())[0][0]


def palette(image: Image.Image) -> Image.Image:
    return image.quantize(32)


def rotated_by_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees to show
    return exif


@pytest.mark.parametrize(
    ("name", "change", "options"),
    [
        ("rgb.png", lambda image: image, {}),
        ("grey.png", lambda image: image.convert("L"), {}),
        ("palette.png", palette, {}),
        ("alpha.png", lambda image: image.convert("RGBA"), {}),
        ("cmyk.jpg", lambda image: image.convert("CMYK"), {}),
        ("ycbcr.jpg", lambda image: image, {}),
        ("exif.jpg", lambda image: image, {"exif": rotated_by_exif()}),
        ("bits.png", lambda image: image.convert("1"), {}),
    ],
)
def test_every_kind_of_file_gives_the_pixels_that_timm_measures(
    tmp_path: Path, name: str, change, options
):
    path = save(change(PHOTOGRAPHS[0]), tmp_path / f"n03877845/{name}", **options)
    ours = load_dataset("image-folder", split="x", root=tmp_path).image(0).convert("RGB")
    theirs = decoded_by_timm(path)
    assert ours.size == theirs.size == (160, 120), "an EXIF rotation is not applied"
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    config = {
        "input_size": (3, 64, 64), "interpolation": "bicubic", "crop_pct": 0.9,
        "crop_mode": "center", "mean": (0.5,) * 3, "std": (0.5,) * 3,
    }  # fmt: skip
    assert torch.equal(preprocessing(config)(ours), preprocessing(config)(theirs))


def test_what_does_not_decode_to_its_end_is_named(tmp_path: Path):
    buffer = io.BytesIO()
    PHOTOGRAPHS[0].save(buffer, "JPEG")
    content = buffer.getvalue()
    for spoiled in (content[: len(content) // 2], content[:20], b"", b"GIF89a", bytes(500)):
        with pytest.raises(
            DatasetError, match=f"x.jpg: expected a readable image, found {len(spoiled)} by"
        ):
            decode(spoiled, "x.jpg")


def test_an_image_that_changed_after_its_identity_was_taken_is_a_named_failure(flat: Path):
    dataset = listed(flat, "file,label\nILSVRC2012_val_00000001.JPEG,a\n")
    dataset.identity()
    path = flat / "val/ILSVRC2012_val_00000001.JPEG"
    # Bytes in the middle: the JPEG still decodes, to other pixels. Only its digest can tell.
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x55
    path.write_bytes(bytes(content))
    with pytest.raises(DatasetError, match=f"{path}: .* changed after the plan was made"):
        dataset.image(0)
    path.unlink()
    with pytest.raises(DatasetError, match=f"{path}: expected a readable image file, but No such"):
        dataset.image(0)


def test_an_unreadable_file_is_named_when_its_content_is_needed(flat: Path):
    dataset = listed(flat, "file,label\nILSVRC2012_val_00000001.JPEG,a\n")
    (flat / "val/ILSVRC2012_val_00000001.JPEG").unlink()
    with pytest.raises(DatasetError, match=r"00000001.JPEG: expected a readable image file, but"):
        dataset.identity()


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A memory that remembers every folder, and six old files."""
    monkeypatch.setattr(file_digests, "MEMORY", tmp_path / "memory")
    monkeypatch.setattr(file_digests, "WORTH_FILES", 1)
    (tmp_path / "files").mkdir()
    for i in range(6):
        age(write(tmp_path / f"files/{i}", f"content {i}"))
    return tmp_path / "memory"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def age(path: Path, seconds: float = 60) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


NAMES = [str(i) for i in range(6)]


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    read: list[str] = []
    digest = file_digests._digest

    def counted(folder: Path, name: str):
        read.append(name)
        return digest(folder, name)

    monkeypatch.setattr(file_digests, "_digest", counted)
    return read


def test_contents_are_read_once_and_again_only_where_a_file_changed(
    memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    read, folder = count_reads(monkeypatch), tmp_path / "files"
    first = content_digests(folder, NAMES)
    assert sorted(read) == NAMES
    read.clear()
    assert content_digests(folder, NAMES) == first
    assert content_digests(folder, ["3", "1"]) == [first[3], first[1]]
    assert read == []
    age(write(folder / "2", "CONTENT 2"), seconds=30)  # the same size, another time
    age(write(folder / "4", "longer content 4"))
    second = content_digests(folder, NAMES)
    assert sorted(read) == ["2", "4"]
    assert [i for i in range(6) if first[i] != second[i]] == [2, 4]


def test_a_file_that_is_too_young_is_not_remembered(
    memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It may change again without its time stamp telling."""
    (tmp_path / "files/5").write_text("new")
    read = count_reads(monkeypatch)
    for _ in range(2):
        content_digests(tmp_path / "files", NAMES)
    assert read.count("5") == 2
    assert read.count("0") == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-3],
        lambda content: content.replace(b"0", b"1", 1),
        lambda content: content[65:],
        lambda content: b"",
        lambda content: bytes([content[0] ^ 1]) + content[1:],
    ],
)
def test_a_damaged_memory_is_read_again_and_mended(
    memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage
):
    first = content_digests(tmp_path / "files", NAMES)
    (kept,) = memory.iterdir()
    kept.write_bytes(damage(kept.read_bytes()))
    read = count_reads(monkeypatch)
    assert content_digests(tmp_path / "files", NAMES) == first
    assert sorted(read) == NAMES
    read.clear()
    assert content_digests(tmp_path / "files", NAMES) == first
    assert read == []


def test_a_memory_that_cannot_be_written_costs_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: Path
):
    memory.write_text("a file where the folder should be")
    first = content_digests(tmp_path / "files", NAMES)
    assert content_digests(tmp_path / "files", NAMES) == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["files", "memory"]


def test_what_was_remembered_wrongly_is_forgotten_when_an_image_shows_it(
    memory: Path, tmp_path: Path
):
    """A file changed under the same size and time stamp: the image fails once, then it is read."""
    root = tmp_path / "images"
    for i in range(2):
        age(save(PHOTOGRAPHS[i], root / f"a/{i}.bmp"))
    planned = load_dataset("image-folder", split="x", root=root).identity()
    pixels = bytearray((root / "a/0.bmp").read_bytes())
    pixels[-1] ^= 1
    stamp = os.stat(root / "a/0.bmp").st_mtime_ns
    (root / "a/0.bmp").write_bytes(bytes(pixels))
    os.utime(root / "a/0.bmp", ns=(stamp, stamp))
    dataset = load_dataset("image-folder", split="x", root=root)
    assert dataset.identity() == planned
    with pytest.raises(DatasetError, match="changed after the plan was made"):
        dataset.image(0)
    assert load_dataset("image-folder", split="x", root=root).identity() != planned


def test_writers_at_once_leave_a_whole_memory(memory: Path, tmp_path: Path):
    from concurrent.futures import ThreadPoolExecutor

    def ask(part: list[str]) -> list[str]:
        return [d for _ in range(20) for d in content_digests(tmp_path / "files", part)]

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, [NAMES[:3], NAMES[3:], NAMES, NAMES[::-1]]))
    expected = content_digests(tmp_path / "files", NAMES)
    assert answers[2][:6] == answers[3][:6][::-1] == expected
    assert len(list(memory.iterdir())) == 1, "nothing is left aside"
    assert file_digests._remembered(tmp_path / "files")
    forget(tmp_path / "files")
    assert list(memory.iterdir()) == []


@pytest.mark.parametrize("target", ["more", "nowhere.png"])
def test_a_link_that_leads_to_no_file_is_an_error_and_never_left_out(tmp_path: Path, target: str):
    save(PHOTOGRAPHS[0], tmp_path / "images/a/1.png")
    save(PHOTOGRAPHS[1], tmp_path / "more/2.png")
    (tmp_path / "images/a/link.png").symlink_to(tmp_path / target)
    with pytest.raises(DatasetError, match=r"link\.png: expected a file or a folder"):
        load_dataset("image-folder", split="test", root=tmp_path / "images")
