import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tasks.checkpoints import (
    CheckpointError,
    CheckpointRef,
    architecture_family,
    describe_local,
    describe_timm,
    load_checkpoint,
    save_checkpoint,
)
from tasks.networks import build_network, vit

DATA_CONFIG = {
    "input_size": (1, 8, 8),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
    "mean": (0.5,),
    "std": (0.5,),
}
VIT, VIT_ARGS = vit(
    in_chans=1, img_size=8, num_classes=10, patch_size=4, width=8, depth=2, heads=2, mlp_ratio=2.0
)
MLP_ARGS = {"in_chans": 1, "img_size": 8, "num_classes": 10, "width": 6, "activation": "tanh"}


def tiny_vit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(VIT, **VIT_ARGS).eval()


def save_vit(folder: Path, model: nn.Module | None = None, **changes: Any) -> Path:
    save_checkpoint(
        model or tiny_vit(),
        folder,
        architecture=VIT,
        model_args=VIT_ARGS | changes,
        data_config=DATA_CONFIG,
        family="small",
    )
    return folder


def images(n: int = 3, channels: int = 1, size: int = 8) -> torch.Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(1))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def load(folder: Path, **options: Any):
    return load_checkpoint(describe_local(folder), **options)


def test_a_saved_vit_loads_with_the_same_weights_and_outputs(tmp_path: Path) -> None:
    model = tiny_vit()
    loaded = load(save_vit(tmp_path / "a", model), dtype=torch.float64)
    assert all(
        torch.equal(ours, theirs.double())
        for ours, theirs in zip(loaded.model.parameters(), model.parameters(), strict=True)
    )
    with torch.no_grad():
        expected = model.double()(images().double())
        # Fused attention, off in the loaded one, sums in another order: a few ulps of float64.
        torch.testing.assert_close(loaded.model(images().double()), expected, rtol=0, atol=1e-13)
    assert loaded.num_outputs == 10
    assert loaded.num_parameters == sum(p.numel() for p in model.parameters())
    assert tuple(loaded.data_config["input_size"]) == (1, 8, 8)


@pytest.mark.parametrize("architecture", ["mlp", "lenet", "vgg11"])
def test_our_own_networks_load_bit_for_bit(tmp_path: Path, architecture: str) -> None:
    arguments = MLP_ARGS if architecture == "mlp" else {
        "in_chans": 1, "img_size": 28, "num_classes": 10,
    }  # fmt: skip
    size = arguments["img_size"]
    model = build_network(f"flatcensus_{architecture}", arguments)
    save_checkpoint(
        model,
        tmp_path / "a",
        architecture=f"flatcensus_{architecture}",
        model_args=arguments,
        data_config=DATA_CONFIG | {"input_size": (1, size, size)},
        family=architecture,
    )
    loaded = load(tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(loaded.model(images(size=size)), model(images(size=size)))
    assert loaded.data_config["mean"] == [0.5]


def test_timm_itself_reads_what_we_save(tmp_path: Path) -> None:
    model = tiny_vit()
    folder = save_vit(tmp_path / "a", model)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(theirs(images()), model(images()))
    assert tuple(theirs.pretrained_cfg["input_size"]) == (1, 8, 8)


def test_we_read_what_timm_itself_saves(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=7, pretrained_cfg="r160_in1k").eval()
    timm.models.save_for_hf(model, str(tmp_path / "a"), safe_serialization=True)
    loaded = load(tmp_path / "a")
    with torch.no_grad():
        expected = model(images(channels=3, size=160))
        found = loaded.model(images(channels=3, size=160))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # fused attention, float32
    assert (loaded.num_outputs, loaded.data_config["crop_pct"]) == (7, 0.95)
    assert describe_local(tmp_path / "a").family == "vision_transformer"


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_torch_files_of_tensors_are_read(tmp_path: Path, suffix: str) -> None:
    model = tiny_vit()
    folder = save_vit(tmp_path / "a", model)
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": model.state_dict()}, folder / f"weights{suffix}")
    loaded = load(folder)
    for ours, theirs in zip(loaded.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert "state_dict" not in loaded.model.pretrained_cfg, "no second copy of the weights"


def test_equal_weights_give_equal_bytes(tmp_path: Path) -> None:
    for name in "ab":
        save_vit(tmp_path / name)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_extra_information_is_kept_with_the_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(
        tiny_vit(), tmp_path, architecture=VIT, model_args=VIT_ARGS, data_config=DATA_CONFIG,
        family="small", extra={"learning_rate": 0.1},
    )  # fmt: skip
    assert json.loads((tmp_path / "config.json").read_text())["extra"] == {"learning_rate": 0.1}
    load(tmp_path)


def test_the_identity_is_content_and_not_place(tmp_path: Path) -> None:
    a, b = describe_local(save_vit(tmp_path / "a")), describe_local(save_vit(tmp_path / "b"))
    assert (a.name, a.family, a.identity) == ("a", "small", b.identity)
    other_weights = describe_local(save_vit(tmp_path / "c", tiny_vit(seed=1)))
    edit_config(tmp_path / "b", lambda c: c["pretrained_cfg"].update(crop_pct=0.9))
    assert len({a.identity, other_weights.identity, describe_local(tmp_path / "b").identity}) == 3


def test_a_reference_survives_json(tmp_path: Path) -> None:
    ref = describe_local(save_vit(tmp_path / "a"))
    assert CheckpointRef.model_validate_json(ref.model_dump_json()) == ref


def test_a_loaded_network_is_frozen_in_eval_mode_with_fused_attention_off(tmp_path: Path) -> None:
    model = load(save_vit(tmp_path / "a")).model
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    fused = [m.fused_attn for m in model.modules() if hasattr(m, "fused_attn")]
    assert fused == [False, False]


class Bomb:
    """Unpickling this makes a folder: proof that code ran."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("name", ["weights.pt", "weights.pth", "pytorch_model.bin"])
def test_a_pickle_bomb_is_refused_and_never_runs(tmp_path: Path, name: str) -> None:
    folder = save_vit(tmp_path / "a")
    (folder / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1), "y": Bomb(tmp_path / "ran")}, folder / name)
    with pytest.raises(
        CheckpointError, match=r"refused\. It is damaged or holds more than weights"
    ):
        load(folder)
    assert not (tmp_path / "ran").exists()
    torch.load(folder / name, weights_only=False)
    assert (tmp_path / "ran").exists(), "the bomb was live"


@pytest.mark.parametrize("name", ["model.pkl", "model.pickle", "model.npz", "model.ckpt", "m.h5"])
def test_formats_that_can_execute_code_are_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = save_vit(tmp_path / "a")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match=f"no weights in a format .* found {name}"):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_several_weight_files_are_not_guessed_between(tmp_path: Path) -> None:
    folder = save_vit(tmp_path / "a")
    (folder / "model.safetensors").unlink()
    for name in ("a.pt", "b.pt"):
        torch.save({}, folder / name)
    with pytest.raises(CheckpointError, match=r"expected one weights file, found a\.pt, b\.pt"):
        describe_local(folder)


def test_missing_and_unexpected_keys_are_counted_and_named(tmp_path: Path) -> None:
    folder = save_vit(tmp_path / "a")
    state = load_file(folder / "model.safetensors")
    for key in [key for key in state if key.startswith("blocks.1.")]:
        del state[key]
    state["extra.weight"] = torch.zeros(2)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="weights of another architecture") as error:
        load(folder)
    assert '12 missing: "blocks.1.norm1.weight"' in str(error.value)
    assert '1 unexpected: "extra.weight"' in str(error.value)


def test_our_networks_name_keys_of_another_architecture_too(tmp_path: Path) -> None:
    folder = save_vit(tmp_path / "a")
    edit_config(folder, lambda c: c.update(architecture="flatcensus_mlp", model_args=MLP_ARGS))
    with pytest.raises(
        CheckpointError, match=rf"8 missing: .*{len(tiny_vit().state_dict())} unexpected: "
    ):
        load(folder)


def test_other_shapes_are_named(tmp_path: Path) -> None:
    folder = save_vit(tmp_path / "a")
    edit_config(folder, lambda c: c["model_args"].update(embed_dim=16))
    with pytest.raises(
        CheckpointError, match=r"of another shape: cls_token \[1, 1, 8\] instead of"
    ):
        load(folder)


def test_position_embeddings_are_not_resampled_silently(tmp_path: Path) -> None:
    folder = save_vit(tmp_path / "a")
    edit_config(folder, lambda c: c["model_args"].update(img_size=16))
    edit_config(folder, lambda c: c["pretrained_cfg"].update(input_size=[1, 16, 16]))
    with pytest.raises(CheckpointError, match=r"pos_embed has shape \(1, 5, 8\)"):
        load(folder)


def test_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    folder = save_vit(tmp_path / "a")
    edit_config(folder, lambda c: (c["model_args"].pop("num_classes"), c.update(num_classes=3)))
    with pytest.raises(CheckpointError, match=r"of another shape: head.weight"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 5, 200, -100])
def test_truncated_weights_are_named(tmp_path: Path, keep: int) -> None:
    path = save_vit(tmp_path / "a") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"{path}: expected a safetensors file"):
        load(tmp_path / "a")


@pytest.mark.parametrize("keep", [0, 5, 200, -100])
def test_truncated_torch_files_are_named(tmp_path: Path, keep: int) -> None:
    folder = save_vit(tmp_path / "a")
    (folder / "model.safetensors").unlink()
    torch.save(tiny_vit().state_dict(), folder / "model.pt")
    content = (folder / "model.pt").read_bytes()
    (folder / "model.pt").write_bytes(content[:keep])
    with pytest.raises(CheckpointError, match=f"{folder / 'model.pt'}: "):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    model = tiny_vit()
    model.get_parameter("blocks.1.mlp.fc1.weight").data[3, 1] = value
    with pytest.raises(
        CheckpointError, match=r"1 tensors hold NaN .*: blocks\.1\.mlp\.fc1\.weight"
    ):
        load(save_vit(tmp_path / "a", model))


def test_a_folder_that_changed_after_it_was_described_is_refused(tmp_path: Path) -> None:
    ref = describe_local(save_vit(tmp_path / "a"))
    save_vit(tmp_path / "a", tiny_vit(seed=1))
    with pytest.raises(CheckpointError, match="The folder changed"):
        load_checkpoint(ref)


def test_config_problems_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: not found"):
        describe_local(tmp_path / "absent")
    folder = save_vit(tmp_path / "a")
    (folder / "config.json").write_text('{"architecture": ')
    with pytest.raises(CheckpointError, match=r"config\.json: expected JSON"):
        describe_local(folder)
    (folder / "config.json").write_text('{"num_classes": 10}')
    with pytest.raises(CheckpointError, match="string 'architecture'"):
        describe_local(folder)
    (folder / "config.json").write_text('{"architecture": "vit_tny_patch16_224"}')
    with pytest.raises(CheckpointError, match="Did you mean vit_tiny_patch16_224"):
        describe_local(folder)


def test_an_unknown_model_argument_is_named(tmp_path: Path) -> None:
    folder = save_vit(tmp_path / "a")
    edit_config(folder, lambda c: c["model_args"].update(colour="red"))
    with pytest.raises(CheckpointError, match="colour"):
        load(folder)
    edit_config(folder, lambda c: c.update(architecture="flatcensus_mlp"))
    with pytest.raises(CheckpointError, match=r"flatcensus_mlp does not take these model_args"):
        load(folder)


def test_a_data_config_that_does_not_fit_the_network_is_named(tmp_path: Path) -> None:
    folder = save_vit(tmp_path / "a")
    edit_config(folder, lambda c: c["pretrained_cfg"].update(input_size=[1, 9, 9]))
    with pytest.raises(CheckpointError, match=r"its own input_size \(1, 9, 9\)"):
        load(folder)


def test_a_checkpoint_without_classifier_is_refused(tmp_path: Path) -> None:
    model = timm.create_model(VIT, **VIT_ARGS | {"num_classes": 0})
    with pytest.raises(CheckpointError, match="has no classifier"):
        load(save_vit(tmp_path / "a", model, num_classes=0))


def test_timm_weights_must_be_a_safetensors_file(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"")
    ref = describe_timm("test_vit", identity="hub:x/y@c/w.bin", path=tmp_path / "w.bin")
    assert (ref.name, ref.tag) == ("test_vit.r160_in1k", "r160_in1k")
    with pytest.raises(CheckpointError, match=r"expected a \.safetensors file"):
        load_checkpoint(ref)


def test_timm_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(timm.create_model("test_vit2").state_dict(), path)
    with pytest.raises(CheckpointError, match="weights of another architecture than 'test_vit'"):
        load_checkpoint(describe_timm("test_vit", identity="hub:x/y@c/w", path=path))


def test_families_are_the_modules_that_define_the_architecture() -> None:
    assert architecture_family("deit_tiny_patch16_224") == "deit"
    assert architecture_family("flatcensus_mlp") == "flatcensus_mlp"


@pytest.mark.parametrize(
    ("architecture", "channels", "size", "expected"),
    [
        ("vgg11", 3, 32, 97_018),
        ("vgg11", 1, 28, 96_730),
        ("mlp", 1, 28, 898_510),
        ("mlp", 3, 32, 2_042_510),
        ("lenet", 1, 28, 61_706),
        ("lenet", 3, 32, 62_006),
    ],
)
def test_the_papers_networks_have_the_papers_sizes(
    architecture: str, channels: int, size: int, expected: int
) -> None:
    model = build_network(
        f"flatcensus_{architecture}", {"in_chans": channels, "img_size": size, "num_classes": 10}
    )
    assert sum(p.numel() for p in model.parameters()) == expected
    with torch.no_grad():
        assert model(images(2, channels, size)).shape == (2, 10)


def test_the_papers_initialisations() -> None:
    """Standard deviations of n normal draws have relative standard error 1 / sqrt(2 n)."""
    torch.manual_seed(0)
    vgg = build_network("flatcensus_vgg11", {"in_chans": 3, "img_size": 32, "num_classes": 10})
    for layer in vgg:
        if isinstance(layer, nn.Conv2d):
            assert layer.bias is not None
            assert not layer.bias.any()
            ratio = layer.weight.std().item() / (2 / (9 * layer.out_channels)) ** 0.5
            assert abs(ratio - 1) < 4 / (2 * layer.weight.numel()) ** 0.5
    lenet = build_network("flatcensus_lenet", {"in_chans": 3, "img_size": 32, "num_classes": 10})
    first_linear = next(layer for layer in lenet if isinstance(layer, nn.Linear))
    ratio = first_linear.weight.std().item() / (2 / (400 + 120)) ** 0.5
    assert abs(ratio - 1) < 4 / (2 * first_linear.weight.numel()) ** 0.5
    assert not first_linear.bias.any()


def test_sizes_that_do_not_divide_are_refused() -> None:
    sizes = {"in_chans": 1, "img_size": 8, "num_classes": 10, "depth": 1, "mlp_ratio": 2.0}
    with pytest.raises(ValueError, match="patch_size = 3 does not divide the image size 8"):
        vit(**sizes, patch_size=3, width=8, heads=2)
    with pytest.raises(ValueError, match="heads = 3 does not divide width = 8"):
        vit(**sizes, patch_size=4, width=8, heads=3)
    with pytest.raises(ValueError, match="at least 12 pixels"):
        build_network("flatcensus_lenet", {"in_chans": 1, "img_size": 8, "num_classes": 10})
