"""The families of timm's vision transformers: what is special in each, and a small member.

A family is a module of timm. What a family needs is data here and is found in the networks
themselves where code depends on it (``tasks.preparation`` looks for attributes, ``tasks.precision``
for casts, ``tasks.plain_layers`` for weights), so that a network of another origin with the same
trait is treated alike. Tests compare the two, on the members below.

What holds for every family is in ``DEFAULTS`` once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tasks.measurement import Status


@dataclass(frozen=True)
class Choice:
    """What is done with networks that have a trait, and why.

    Attributes:
        done: What measurements do about it.
        reason: Why, with what was measured.
        cannot: Series that are not defined for such a network; the checkpoint is not refused.
        status: What the summary says for those series.
    """

    done: str
    reason: str
    cannot: tuple[str, ...] = ()
    status: Status = Status.OK


DEFAULTS: Mapping[str, Choice] = {
    "products": Choice(
        "Backward of the backward pass, from one graph per batch; forward mode is the check.",
        "A product pair costs 2.3 to 2.9 forwards, against 5.6 to 6.3 with forward mode. "
        "torch.func.linearize is wrong from its second call on where something is in place.",
    ),
    "precision": Choice(
        "float32 with TF32 off; slope of the sigmoid, sums and statistics in float64.",
        "Products are within 2e-5 of float64, and the self-test measures that for each network. "
        "16 bits lose whole rows of the Jacobian.",
    ),
    "images": Choice(
        "One product serves all images of a batch.",
        "In eval mode no image depends on another; the self-test checks it.",
    ),
}

TRAITS: Mapping[str, Choice] = {
    "fused_attention": Choice(
        "Off: plain matrix products.",
        "The fused kernels have neither forward-mode derivatives nor a double backward.",
    ),
    "cached_biases": Choice(
        "Attention biases are gathered at every forward.",
        "Kept from the first forward, neither gradients nor noise would reach them again.",
    ),
    "batch_norm": Choice(
        "The affine map that it is.",
        "torch's CPU backward in eval mode is wrong for one image with a transposed gradient "
        "(off by 140 %).",
    ),
    "in_place": Choice(
        "Layers get a sum with zeros as input, which nothing else sees or overwrites.",
        "The gradient through a layer alone would be that of an overwritten tensor.",
    ),
    "kinks": Choice(
        "Derivatives are those of the piece that the image lies in.",
        "ReLU, hard swish or max pooling: Eq. 40 and the trace of the Hessian do not see the "
        "kinks, Eq. 46 does; differences agree with derivatives to 1e-4, not 1e-7.",
    ),
    "casts": Choice(
        "Ignored in a float64 network; in a float32 one they do nothing.",
        "Computed in float32 whatever the weights are, a part would bring float32's rounding into "
        "a float64 network, where no check of its products sees it.",
    ),
    "constant_inputs": Choice(
        "Layers on inputs that are the same for all images are left out of sums over layers.",
        "Tables of relative positions and learned queries: their sensitivity is 0.",
        status=Status.CONSTANT_INPUT,
    ),
    "standardised_weights": Choice(
        "Measured, but for norms of layers.",
        "The convolution applies its weight less its mean, over its deviation: the parameter has "
        "a gradient, but is not the matrix that the bounds are about.",
        cannot=("matrix_normalized_sharpness", "mls_bound", "nmls_bound"),
        status=Status.OWN_WEIGHT,
    ),
}


@dataclass(frozen=True)
class Member:
    """An architecture, and arguments that make it small.

    Attributes:
        family: Module of timm, which is what ``family`` is in tables.
        architecture: Of timm.
        traits: Keys of ``TRAITS``, as found in it.
        model_args: Keyword arguments, JSON values.
    """

    family: str
    architecture: str
    traits: tuple[str, ...]
    model_args: Mapping[str, Any]

    @property
    def pixels(self) -> int:
        """Height and width of the images that it is tested on."""
        return self.model_args.get("img_size", 64)

    @property
    def cannot(self) -> Mapping[str, Status]:
        """Series that are not defined for it, with the status that says so."""
        choices = [TRAITS[trait] for trait in self.traits]
        return {series: choice.status for choice in choices for series in choice.cannot}


def _member(family: str, architecture: str, traits: str = "", **model_args: Any) -> Member:
    return Member(family, architecture, tuple(traits.split()), model_args)


# Arguments that make members small; what cannot be made small stays as it is.
_VIT = {"img_size": 64, "depth": 2}
_SMALL = {**_VIT, "embed_dim": 96, "num_heads": 3}
_SHALLOW, _NARROW = [1, 1, 1, 1], [16, 32, 64, 128]
_CROSS = {
    "img_size": 96,
    "img_scale": [1.0, 0.667],  # the second branch gets a resampled image, as in all members
    "embed_dim": [32, 64],
    "num_heads": [2, 2],
    "depth": [[1, 1, 0]],
}
_LEVIT = {"img_size": 64, "embed_dim": [32, 48, 64], "depth": [1, 1, 1]}
_MAXVIT = {
    "img_size": 64,
    "embed_dim": [32, 32, 32, 32],
    "depths": _SHALLOW,
    "stem_width": [8, 16],
}

# Together the members of a family have every trait that its pretrained architectures have.
MEMBERS = (
    _member("convit", "convit_tiny", "in_place constant_inputs", **_VIT, local_up_to_layer=1),
    _member("crossvit", "crossvit_9_240", "fused_attention", **_CROSS),
    _member("crossvit", "crossvit_9_dagger_240", "fused_attention in_place kinks", **_CROSS),
    _member(
        "davit",
        "davit_tiny",
        "fused_attention",
        depths=_SHALLOW,
        embed_dims=[24, 48, 96, 192],
        num_heads=[1, 2, 4, 8],
    ),
    _member("deit", "deit_tiny_distilled_patch16_224", "fused_attention", **_VIT),
    _member(
        "efficientvit_mit",
        "efficientvit_b0",
        "batch_norm in_place kinks casts",
        depths=_SHALLOW,
        head_widths=[128, 160],
    ),
    _member(
        "efficientvit_msra",
        "efficientvit_m0",
        "cached_biases batch_norm in_place kinks",
        img_size=64,
        depth=[1, 1, 1],
        embed_dim=[32, 64, 96],
    ),
    _member("eva", "vit_small_patch16_rope_224", "fused_attention", **_SMALL),
    _member("eva", "vit_small_patch16_rope_mixed_224", "fused_attention casts", **_SMALL),
    _member(
        "fastvit",
        "fastvit_sa12",
        "fused_attention batch_norm in_place kinks",
        layers=_SHALLOW,
        embed_dims=_NARROW,
    ),
    _member(
        "fastvit", "fastvit_t8", "batch_norm in_place kinks", layers=_SHALLOW, embed_dims=_NARROW
    ),
    _member("gcvit", "gcvit_xxtiny", "kinks", img_size=64, embed_dim=16),
    _member("levit", "levit_128s", "cached_biases batch_norm kinks", **_LEVIT),
    _member("levit", "levit_conv_128s", "cached_biases batch_norm kinks", **_LEVIT),
    _member(
        "maxxvit",
        "maxvit_rmlp_pico_rw_256",
        "fused_attention batch_norm in_place constant_inputs",
        **_MAXVIT,
    ),
    _member("maxxvit", "maxxvitv2_nano_rw_256", "fused_attention", **_MAXVIT),
    _member("maxxvit", "maxvit_tiny_tf_224", "fused_attention batch_norm in_place", **_MAXVIT),
    _member("mobilevit", "mobilevit_xxs", "fused_attention batch_norm in_place"),
    _member("mobilevit", "mobilevitv2_050", "batch_norm in_place kinks"),
    _member("mvitv2", "mvitv2_tiny", "in_place kinks", img_size=64),
    _member("naflexvit", "naflexvit_base_patch16_gap", "fused_attention in_place casts", **_SMALL),
    _member(
        "nextvit", "nextvit_small", "fused_attention batch_norm in_place kinks", depths=[1, 1, 5, 1]
    ),
    _member(
        "repvit", "repvit_m0_9", "batch_norm in_place kinks", depth=_SHALLOW, embed_dim=_NARROW
    ),
    _member(
        "shvit",
        "shvit_s1",
        "batch_norm in_place kinks",
        depth=[1, 1, 1],
        embed_dim=[64, 96, 128],
        partial_dim=[16, 24, 32],
    ),
    _member(
        "tiny_vit",
        "tiny_vit_5m_224",
        "fused_attention cached_biases batch_norm in_place",
        depths=_SHALLOW,
        embed_dims=[16, 32, 40, 80],
        num_heads=[1, 2, 2, 4],
    ),
    _member("vision_transformer", "vit_tiny_patch16_224", "fused_attention", **_VIT),
    _member(
        "vision_transformer",
        "vit_dwee_patch16_reg1_gap_256",
        "fused_attention in_place casts",
        **_VIT,
    ),
    _member(
        "vision_transformer",
        "vit_base_patch16_siglip_224",
        "fused_attention constant_inputs",
        **_SMALL,
    ),
    _member(
        "vision_transformer_hybrid",
        "vit_tiny_r_s16_p8_224",
        "fused_attention in_place kinks standardised_weights",
        **_VIT,
    ),
    _member(
        "vision_transformer_relpos",
        "vit_relpos_small_patch16_224",
        "fused_attention constant_inputs",
        **_SMALL,
    ),
    _member(
        "vision_transformer_relpos",
        "vit_srelpos_small_patch16_224",
        "fused_attention constant_inputs",
        **_SMALL,
    ),
)

FAMILIES: Mapping[str, tuple[Member, ...]] = {
    name: tuple(m for m in MEMBERS if m.family == name)
    for name in {m.family: None for m in MEMBERS}
}


def traits_of(family: str) -> tuple[str, ...]:
    """Traits that some member of a family has, in the order of ``TRAITS``."""
    return tuple(t for t in TRAITS if any(t in member.traits for member in FAMILIES[family]))
