import math
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
import timm
import torch
from torch import nn

from pipeline.specs import spec_key
from tasks import training
from tasks.checkpoints import describe_local, load_checkpoint, save_checkpoint
from tasks.datasets import DatasetError, ImageDataset, load_dataset, tensors
from tasks.measurement import MeasurementError, Row
from tasks.training import TrainSettings, train
from tasks.training_network import network_for

TRAIN, TEST = (load_dataset("digits", split=split) for split in ("train", "test"))
TINY_VIT = {"network": "vit", "width": 8, "depth": 1, "heads": 2, "patch_size": 4, "steps": 6}


def settings(**changes: Any) -> TrainSettings:
    defaults = {"network": "mlp", "width": 16, "depth": 1, "steps": 6, "eval_every": 3}
    return TrainSettings(**(defaults | changes if "network" not in changes else changes))


def value(rows: list[Row], quantity: str, step: int | None = None) -> float:
    (found,) = (row.value for row in rows if (row.quantity, row.step) == (quantity, step))
    return found


def weights(trained: training.Trained) -> list[torch.Tensor]:
    return list(trained.model.state_dict().values())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {**TINY_VIT, "dropout": 0.1, "optimizer": "adamw"},
        {"network": "vgg11", "steps": 3},
    ],
)
def test_equal_settings_give_equal_bits(changes: dict[str, Any]) -> None:
    first = train(settings(**changes), TRAIN, TEST)
    torch.manual_seed(99)  # another state of the global generator must not matter
    second = train(settings(**changes), TRAIN, TEST)
    assert all(map(torch.equal, weights(first), weights(second)))
    assert first.rows == second.rows


def test_another_seed_gives_another_network() -> None:
    first, second = (train(settings(seed=seed), TRAIN, TEST) for seed in (0, 1))
    assert not torch.equal(weights(first)[0], weights(second)[0])


def test_training_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(settings(**TINY_VIT, dropout=0.5), TRAIN, TEST)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_history_does_not_change_the_weights() -> None:
    vit = TINY_VIT | {"dropout": 0.3}
    quiet, talkative = (train(settings(**vit, eval_every=n), TRAIN, TEST) for n in (0, 1))
    assert all(map(torch.equal, weights(quiet), weights(talkative)))


def test_one_step_of_sgd_is_the_hand_made_gradient_step() -> None:
    """theta' = theta - rate (grad + decay theta), with the batch of the first permutation."""
    shared = {"width": 16, "depth": 1, "loss": "mse", "batch_size": 32, "eval_every": 0}
    one = TrainSettings(network="mlp", steps=1, weight_decay=0.01, **shared)
    still = TrainSettings(network="mlp", steps=1, learning_rate=1e-30, **shared)
    start, found = (train(each, TRAIN, TEST) for each in (still, one))
    order = training.sample_order(TRAIN.identity(), seed=0, length=len(TRAIN))
    inputs, labels = tensors(TRAIN, start.data_config, indices=order)
    batch = next(training._batches(one, len(TRAIN)))
    outputs = start.model.double()(inputs[batch].double())
    targets = nn.functional.one_hot(labels[batch], 10).double()
    nn.MSELoss()(outputs, targets).backward()
    for before, after in zip(start.model.parameters(), found.model.parameters(), strict=True):
        assert before.grad is not None
        expected = before - 0.1 * (before.grad + 0.01 * before)
        torch.testing.assert_close(after.double(), expected, rtol=1e-5, atol=1e-6)  # float32


def test_the_final_rows_are_those_of_the_returned_network() -> None:
    trained = train(settings(steps=30), TRAIN, TEST)
    for name, dataset in (("train", TRAIN), ("test", TEST)):
        inputs, labels = tensors(dataset, trained.data_config)
        with torch.no_grad():
            logits = trained.model(inputs)
        accuracy = (logits.argmax(1) == labels).double().mean().item()
        assert value(trained.rows, f"{name}_accuracy") == accuracy
        # The summation order differs: float32 rounding of about 1e-7 per loss.
        assert value(trained.rows, f"{name}_loss") == pytest.approx(
            nn.functional.cross_entropy(logits, labels).item(), rel=1e-5
        )
    gap = value(trained.rows, "train_accuracy") - value(trained.rows, "test_accuracy")
    assert value(trained.rows, "generalization_gap") == pytest.approx(100 * gap)


def test_accuracies_count_only_the_images_trained_on() -> None:
    trained = train(settings(train_samples=7, steps=200, learning_rate=0.5), TRAIN, TEST)
    assert value(trained.rows, "train_accuracy") == 1.0, "seven images are memorised"
    assert value(trained.rows, "test_accuracy") < 0.9, "and that is not enough to generalise"


def test_a_network_learns_digits() -> None:
    trained = train(settings(steps=300, learning_rate=0.3), TRAIN, TEST)
    assert value(trained.rows, "test_accuracy") > 0.85  # 0.1 is chance
    assert value(trained.rows, "train_loss", step=0) == pytest.approx(math.log(10), abs=0.15)
    assert value(trained.rows, "train_loss") < 0.5


@pytest.mark.slow
def test_the_default_vit_learns_digits_with_adamw() -> None:
    vit = TrainSettings(
        network="vit", patch_size=2, optimizer="adamw", learning_rate=3e-3, steps=300,
        warmup_steps=30, schedule="cosine", eval_every=0,
    )  # fmt: skip
    assert value(train(vit, TRAIN, TEST).rows, "test_accuracy") > 0.6  # 0.1 is chance


def test_the_history_has_a_row_of_each_quantity_at_each_evaluation() -> None:
    trained = train(settings(steps=7, eval_every=3), TRAIN, TEST)
    history = [(row.step, row.quantity) for row in trained.rows if row.step is not None]
    assert history == [
        (step, f"{name}_{what}")
        for step in (0, 3, 6)
        for name in ("train", "test")
        for what in ("loss", "accuracy")
    ]


def test_the_returned_network_is_in_eval_mode_and_holds_no_gradients() -> None:
    model = train(settings(**TINY_VIT), TRAIN, TEST).model
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_progress_counts_every_update() -> None:
    calls: list[tuple[int, int]] = []
    train(settings(steps=4), TRAIN, TEST, progress=lambda *call: calls.append(call))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_divergence_names_the_step_and_the_remedy(loss: str) -> None:
    wild = settings(loss=loss, learning_rate=1e30, steps=20)
    with pytest.raises(
        MeasurementError, match=r"diverged: .* at step [1-9]\d* of 20 with learning_rate = 1e\+30"
    ):
        train(wild, TRAIN, TEST)


def test_divergence_in_the_last_update_is_seen() -> None:
    with pytest.raises(MeasurementError, match="at step 1 of 1"):
        train(settings(loss="mse", learning_rate=1e38, steps=1), TRAIN, TEST)


def test_losses_are_means_over_outputs() -> None:
    logits = torch.tensor([[2.0, -1.0], [0.5, 0.0]], dtype=torch.float64)
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    sigmoid = 1 / (1 + np.exp(-logits.numpy()))
    expected = {
        "mse": [(1 + 1) / 2, (0.25 + 1) / 2],
        "sigmoid_mse": ((sigmoid - targets.numpy()) ** 2).mean(1),
        "cross_entropy": [math.log(1 + math.exp(-3)), math.log(1 + math.exp(0.5))],
    }
    for loss, values in expected.items():
        found = training._loss(settings(loss=loss), logits, targets)
        np.testing.assert_allclose(found.numpy(), values, rtol=1e-14)


def test_schedules_warm_up_and_then_stay_or_fall_to_zero() -> None:
    constant = settings(steps=10, warmup_steps=4)
    assert [training._schedule(constant, step) for step in (0, 1, 3, 4, 9)] == [
        *(0.25, 0.5, 1.0),
        *(1.0, 1.0),
    ]
    cosine = settings(steps=10, schedule="cosine")
    found = [training._schedule(cosine, step) for step in (0, 5, 9)]
    assert found == pytest.approx([1, 0.5, 0.5 * (1 + math.cos(0.9 * math.pi))], abs=1e-15)


def test_each_pass_is_another_permutation_of_all_images() -> None:
    batches = training._batches(settings(batch_size=4), 10)
    passes = [torch.cat([next(batches) for _ in range(3)]).tolist() for _ in range(2)]
    assert [sorted(indices) for indices in passes] == [list(range(10))] * 2
    assert passes[0] != passes[1]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"network": "mlp", "heads": 2}, "heads has no meaning for 'mlp' .only for vit."),
        ({"network": "vit", "activation": "tanh"}, "activation has no meaning for 'vit'"),
        ({"network": "lenet", "width": 10}, "width has no meaning for 'lenet' .only for mlp, vit."),
        ({"network": "vgg11", "dropout": 0.1}, "dropout has no meaning for 'vgg11'"),
        ({"network": "mlp", "optimizer": "adamw", "momentum": 0.9}, "momentum has no meaning"),
        ({"network": "mlp", "steps": 5, "warmup_steps": 5}, "warmup_steps = 5 must be below"),
        ({"network": "mlp", "learning_rate": 0.0}, "learning_rate"),
        ({"network": "mlp", "learning_rate": math.nan}, "learning_rate"),
        ({"network": "mlp", "batchsize": 3}, "batchsize"),
        ({"network": "resnet"}, "network"),
        ({"network": "timm"}, "network = 'timm' needs architecture"),
        ({"network": "timm", "architecture": "levit_128x"}, "Did you mean levit_128"),
        ({"network": "vit", "img_size": 32}, "img_size has no meaning for 'vit' .only for timm."),
        ({"network": "mlp", "steps": "100"}, "steps"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=key):
        TrainSettings(**changes)


def test_defaults_are_those_of_network_and_optimizer() -> None:
    paper = TrainSettings(network="mlp")
    assert (paper.width, paper.depth, paper.activation, paper.heads) == (500, 3, "relu", None)
    assert (paper.optimizer, paper.learning_rate, paper.momentum) == ("sgd", 0.1, 0.0)
    vit = TrainSettings(network="vit", optimizer="adamw")
    assert (vit.patch_size, vit.heads, vit.learning_rate, vit.momentum) == (7, 3, 1e-3, None)


def test_settings_survive_json_and_explicit_defaults_give_the_same_key() -> None:
    timm_network = {"network": "timm", "architecture": "levit_128s", "model_args": {"depth": [1]}}
    for fields in (*({"network": n} for n in ("mlp", "lenet", "vgg11", "vit")), timm_network):
        short = TrainSettings(**fields)
        assert TrainSettings.model_validate_json(short.model_dump_json()) == short
        assert TrainSettings(**short.model_dump()).key_fields() == short.key_fields()
    assert TrainSettings(network="mlp", width=500).key_fields() == (
        TrainSettings(network="mlp").key_fields()
    )


def test_every_setting_is_part_of_the_key() -> None:
    fields = TrainSettings(network="timm", architecture="levit_128s").key_fields()
    assert set(fields) == {"task", "version", *TrainSettings.model_fields}


def test_keys_of_our_own_networks_are_those_of_runs_made_before_timm_could_be_trained() -> None:
    keys = {n: spec_key(TrainSettings(network=n).key_fields()) for n in ("mlp", "vit")}
    assert keys == {"mlp": "10a29e959003d0b0f5c4b05b", "vit": "1da050ae90707bf08d991a4f"}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"network": "vit", "patch_size": 3}, "patch_size = 3 does not divide the image size 8"),
        ({"network": "lenet"}, "at least 12 pixels, found 8"),
        (
            {"network": "timm", "architecture": "crossvit_9_240", "img_size": 64},
            "network 'crossvit_9_240' on the images of digits: ",
        ),
        (
            {"network": "timm", "architecture": "repvit_m0_9", "model_args": {"depht": 2}},
            "network 'repvit_m0_9' on the images of digits: .*depht",
        ),
        ({"network": "mlp", "train_samples": 5000}, "train_samples = 5000, but digits has 1297"),
    ],
)
def test_a_network_that_does_not_fit_the_images_is_refused(
    changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(DatasetError, match=text):
        train(TrainSettings(**changes), TRAIN, TEST)


@pytest.mark.parametrize(
    ("architecture", "size", "model_args"),
    [
        (
            "vit_tiny_patch16_224",
            16,
            {"embed_dim": 24, "depth": 1, "num_heads": 3, "patch_size": 8},
        ),
        ("repvit_m0_9", 32, None),  # images of any size: no img_size among its arguments
    ],
)
def test_any_architecture_of_timm_is_trained_on_resized_images_and_loads_again(
    architecture: str, size: int, model_args: dict[str, Any] | None, tmp_path: Path
) -> None:
    short = TrainSettings(
        network="timm", architecture=architecture, img_size=size, model_args=model_args,
        batch_size=8, steps=2, train_samples=16, eval_every=0,
    )  # fmt: skip
    few = ImageDataset("digits", None, TEST.images[:20], TEST.labels[:20], TEST.class_names)
    trained = train(short, TRAIN, few)
    assert trained.data_config["input_size"] == (1, size, size)
    save_checkpoint(
        trained.model, tmp_path, architecture=trained.architecture,
        model_args=trained.model_args, data_config=trained.data_config, family=short.family,
    )  # fmt: skip
    ref = describe_local(tmp_path)
    assert ref.family == timm.model_entrypoint(architecture).__module__.rpartition(".")[2]
    loaded = load_checkpoint(ref)
    inputs, _ = tensors(few, loaded.data_config)
    assert inputs.shape == (20, 1, size, size)
    torch.testing.assert_close(loaded.model(inputs), trained.model(inputs), rtol=1e-4, atol=1e-5)


def test_sets_of_different_classes_are_refused() -> None:
    other = ImageDataset("letters", None, TEST.images, TEST.labels, tuple("abcdefghij"))
    with pytest.raises(DatasetError, match="Take two splits of one data set"):
        train(settings(), TRAIN, other)


def test_paper_networks_see_pixels_over_255_and_the_vit_is_centred() -> None:
    _, _, config = network_for(settings(), TRAIN)
    inputs, _ = tensors(TRAIN, config)
    assert (inputs.min().item(), inputs.max().item()) == (0.0, 1.0)
    _, _, config = network_for(settings(**TINY_VIT), TRAIN)
    inputs, _ = tensors(TRAIN, config)
    assert (inputs.min().item(), inputs.max().item()) == (-1.0, 1.0)
