"""Classes of data as outputs of networks: names, refusals, and which metrics need labels."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import columns, digits, make_subject, tiny_vit
from populations import save_mlp
from timm.data import ImageNetInfo

from tasks.block import Block
from tasks.checkpoints import describe_local, describe_timm
from tasks.class_labels import LabelError, NetworkClasses, label_map, network_classes
from tasks.measurement import Batch, Measurement, Subject
from tasks.registry import METRICS

INFO = ImageNetInfo()
SYNSETS, WORDS = tuple(INFO.label_names()), tuple(INFO.label_descriptions())


@pytest.fixture(scope="module")
def imagenet() -> NetworkClasses:
    found = network_classes(
        describe_timm("vit_tiny_patch16_224.augreg_in21k_ft_in1k", identity="x"), num_outputs=1000
    )
    assert found is not None
    return found


def test_a_pretrained_network_of_1000_outputs_has_imagenets_classes_in_order(imagenet):
    assert imagenet.names == SYNSETS
    assert imagenet.names[0] == "n01440764"
    assert imagenet.descriptions[0] == "tench, Tinca tinca"


def test_a_subset_of_synset_folders_gets_the_right_outputs(imagenet):
    chosen = sorted(np.random.default_rng(0).choice(1000, 100, replace=False).tolist())
    folders = sorted(SYNSETS[i] for i in chosen)  # as class folders are ordered
    found = label_map(folders, num_outputs=1000, known=imagenet)
    assert [SYNSETS[i] for i in found] == folders
    assert sorted(found) == chosen


def test_all_synset_folders_are_the_outputs_in_order(imagenet):
    assert label_map(sorted(SYNSETS), num_outputs=1000, known=imagenet) == tuple(range(1000))


def test_descriptions_map_like_synsets_although_two_cranes_share_one(imagenet):
    """A ClassLabel cannot hold a name twice, so one crane is "crane2" there."""
    unique = list(WORDS)
    unique[517] = "crane2"
    for names in (WORDS, unique):
        assert label_map(names, num_outputs=1000, known=imagenet) == tuple(range(1000))
    shuffled = np.random.default_rng(1).permutation(1000)
    shuffled = shuffled[shuffled != 134]
    found = label_map([unique[i] for i in shuffled], num_outputs=1000, known=imagenet)
    assert found == tuple(shuffled.tolist())


def test_one_word_of_a_description_suffices_where_only_one_class_has_it(imagenet):
    found = label_map(["tench", "English springer"], num_outputs=1000, known=imagenet)
    assert [SYNSETS[i] for i in found] == ["n01440764", "n02102040"]
    with pytest.raises(LabelError, match="'crane' of the data may be n02012849 or n03126707"):
        label_map(["tench", "crane"], num_outputs=1000, known=imagenet)


def test_integers_are_outputs_in_any_order_and_only_within_range(imagenet):
    names = ["1", "10", "2"]  # as class folders are ordered
    assert label_map(names, num_outputs=1000, known=imagenet) == (1, 10, 2)
    assert label_map(names, num_outputs=11, known=None) == (1, 10, 2)
    with pytest.raises(LabelError, match=r"class 10, but the network has 10 outputs \(0 to 9\)"):
        label_map(names, num_outputs=10, known=None)
    with pytest.raises(LabelError, match="'1' and '01' of the data are both output 1"):
        label_map(["1", "01"], num_outputs=10, known=None)


def test_digits_are_no_outputs_of_an_imagenet_network(imagenet):
    names = [str(n) for n in range(10)]
    with pytest.raises(LabelError, match=r"10 of 10 classes of the data \(0, 1, 2, 3, ...\)"):
        label_map(names, num_outputs=1000, known=imagenet, integers_are_indices=False)
    assert label_map(names, num_outputs=10, known=None, integers_are_indices=False) == tuple(
        range(10)
    )


def test_names_of_another_network_are_refused_with_both_sides_and_what_to_do(imagenet):
    with pytest.raises(LabelError) as caught:
        label_map(["n01440764", "anteater2", "wug"], num_outputs=1000, known=imagenet)
    words = str(caught.value)
    assert "2 of 3 classes of the data (anteater2, wug)" in words
    assert "network's 1000 (n01440764 tench, n01443537 goldfish" in words
    assert 'labels = "ignore"' in words


def test_classes_nobody_named_are_outputs_in_order_only_if_equally_many():
    assert label_map(["ant", "bee"], num_outputs=2, known=None) == (0, 1)
    with pytest.raises(LabelError, match=r"2 classes \(ant, bee\), the network has 3 outputs"):
        label_map(["ant", "bee"], num_outputs=3, known=None)


def set_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_says_what_its_outputs_are_in_config_json(tmp_path: Path):
    save_mlp(tmp_path)
    assert network_classes(describe_local(tmp_path), num_outputs=10) is None
    names = [f"class{i}" for i in range(10)]
    as_object = {str(i): name for i, name in reversed(list(enumerate(names)))}
    for listed in (names, as_object):
        set_config(tmp_path, label_names=listed, label_descriptions={"class3": "a, b"})
        found = network_classes(describe_local(tmp_path), num_outputs=10)
        assert found is not None
        assert found.names == tuple(names)
        assert label_map(["b", "class9"], num_outputs=10, known=found) == (3, 9)


def test_label_names_that_are_not_the_outputs_are_refused(tmp_path: Path):
    save_mlp(tmp_path)
    set_config(tmp_path, label_names=["a", "b"])
    with pytest.raises(LabelError, match=r"label_names in config.json are 2 names, but .* 10 out"):
        network_classes(describe_local(tmp_path), num_outputs=10)


FAST: dict[str, dict[str, Any]] = {
    "adaptive_sharpness": {"max_draws": 2},
    "adaptive_sharpness_limit": {"max_draws": 2},
    "hessian_trace": {"max_draws": 2},
}


@pytest.mark.parametrize("metric", METRICS)
def test_rows_depend_on_labels_exactly_where_the_metric_says_so(metric: str):
    """With other labels all rows stay as they are, or some change; NaN targets are harmless."""
    measurement = METRICS[metric].model_validate(FAST.get(metric, {}))
    images, labels = digits()
    one_hot = torch.nn.functional.one_hot(labels[:4], 10).to(images.dtype)
    subject = make_subject(tiny_vit().double(), images[:4])
    values = [rows(measurement, subject, targets) for targets in (one_hot, one_hot.roll(3, 1))]
    assert np.array_equal(*values, equal_nan=True) != measurement.needs_labels
    if not measurement.needs_labels:
        unread = rows(measurement, subject, torch.full_like(one_hot, torch.nan))
        assert np.array_equal(unread, values[0], equal_nan=True)


def rows(measurement: Measurement, subject: Subject, targets: torch.Tensor) -> np.ndarray:
    def load(samples):
        batch = subject.batch(samples)
        return Batch(batch.inputs, targets[list(samples)], batch.samples)

    relabelled = replace(subject, batch=load, training_batch=load, cache={})
    block = measurement.stages(4, 4)[-1]
    return columns(measurement.measure(relabelled, Block(range(4), block.draws)))["value"]
