"""Outlines: what is counted is what runs, once per network; a damaged cache costs time alone."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import timm
import torch
from oracles import tiny_vit
from timm.data.config import resolve_model_data_config
from torch.utils.flop_counter import FlopCounterMode

from tasks import outline, outline_cache
from tasks.counting import count
from tasks.outline import outline_architecture
from tasks.preparation import prepare

SMALL = "levit_128s.fb_dist_in1k"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    outline._counted.cache_clear()
    return tmp_path


def counted_again() -> bool:
    """Whether an outline is counted now, and not read."""
    outline._counted.cache_clear()
    before = outline._count
    calls: list[object] = []
    outline._count = lambda *parts: calls.append(parts) or before(*parts)  # type: ignore[assignment]
    try:
        outline_architecture(SMALL, {}, {})
    finally:
        outline._count = before
    return bool(calls)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "levit_128s", "mobilevitv2_050"])
def test_operations_and_transforms_are_those_of_timm_and_of_torchs_own_counter(name: str):
    found = outline_architecture(name, {}, {})
    with torch.device("meta"):
        model = prepare(timm.create_model(name))
        images = torch.empty(1, *found.data_config["input_size"])
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(images)
    assert found.forward_flops == counter.get_total_flops() > 0
    assert found.num_parameters == sum(p.numel() for p in model.parameters())
    assert found.data_config == resolve_model_data_config(model)


def kept_bytes(model: torch.nn.Module, images: torch.Tensor) -> tuple[int, int]:
    """What real graphs of one image keep, from the tensors that autograd packs."""
    own = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def total() -> int:
        return sum(t.untyped_storage().nbytes() for t in kept.values())

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(images.requires_grad_())
        single = total()
        cotangent = torch.zeros_like(logits, requires_grad=True)
        torch.autograd.grad(logits, images, cotangent, create_graph=True)
        return single, total()


def test_graphs_keep_on_a_cpu_what_the_meta_device_says():
    model = prepare(tiny_vit().float())
    single, double = kept_bytes(model, torch.randn(1, 1, 8, 8))
    with torch.device("meta"):
        found = count(tiny_vit().float().to("meta"), (1, 8, 8))
    # Kernels may save small statistics in other shapes.
    assert found.graph_bytes == pytest.approx(single, rel=0.05)
    assert found.double_graph_bytes == pytest.approx(double, rel=0.05)
    assert found.graph_bytes < found.double_graph_bytes


def test_grouped_convolutions_make_products_with_the_jacobian_expensive():
    """Torch's double backward does them group by group."""
    depthwise, full = (
        count(
            torch.nn.Sequential(
                torch.nn.Conv2d(64, 64, 3, groups=groups), torch.nn.SiLU(),
                torch.nn.Flatten(), torch.nn.Linear(64 * 36, 4),
            ).to("meta"),
            (64, 8, 8),
        )
        for groups in (64, 1)
    )  # fmt: skip
    assert depthwise.tangent_operators > 64 > full.tangent_operators
    assert depthwise.forward_flops < full.forward_flops


def test_tags_of_one_network_share_its_outline_but_not_their_preprocessing():
    one, other = (
        outline_architecture(f"vit_base_patch16_224.{tag}", {}, {})
        for tag in ("augreg_in21k_ft_in1k", "mae")
    )
    first = outline_architecture("fastvit_t8.apple_in1k", {}, {})
    second = outline_architecture("fastvit_t8.apple_dist_in1k", {}, {})
    assert first.layers is second.layers, "counted once"
    assert one.num_outputs == 1000
    assert other.num_outputs != 1000, "a tag without the classes is another network"


def test_a_second_process_reads_what_the_first_counted():
    assert counted_again()
    assert not counted_again()
    first = outline_architecture(SMALL, {}, {})
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        assert pool.submit(outline_architecture, SMALL, {}, {}).result() == first


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"named": "x"}', b"\xff\xfe"])
def test_a_damaged_cache_is_counted_again_and_mended(own_cache: Path, damage: bytes):
    first = outline_architecture(SMALL, {}, {})
    (file,) = outline_cache.folder().iterdir()
    sound = file.read_bytes()
    changed = sound.replace(b'"num_outputs": 1000', b'"num_outputs": 1001')
    for content in (damage, changed):
        file.write_bytes(content)
        assert counted_again()
        assert file.read_bytes() == sound
    assert outline_architecture(SMALL, {}, {}) == first


def test_a_cache_that_cannot_be_written_is_no_failure(own_cache: Path):
    (own_cache / "flatcensus").write_text("a file in the way")
    assert counted_again()
    assert counted_again()


def test_own_networks_are_not_kept(own_cache: Path):
    args = {"in_chans": 1, "img_size": 8, "num_classes": 10, "width": 4, "depth": 1,
            "activation": "tanh"}  # fmt: skip
    outline_architecture("flatcensus_mlp", args, {"input_size": [1, 8, 8]})
    assert not outline_cache.folder().exists()


def test_the_network_that_torchs_counter_cannot_follow_is_outlined():
    found = outline_architecture("vit_so400m_patch14_siglip_378.webli_ft_in1k", {}, {})
    assert found.num_outputs == 1000
    assert found.forward_flops > 5e11
