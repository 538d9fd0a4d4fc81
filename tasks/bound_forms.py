"""The forms that an inequality takes where a weight is shared between tokens or patches.

The printed inequalities rest on || d f / d W ||_F = || d f / d z ||_F ||x||, which holds where a
layer applies its weight **once per image**. A weight shared by tokens or patches can have a zero
gradient while the input's is not. So each is evaluated in several forms, by what stands for the
gradient of the layer:

    printed       || d f / d W_l ||_F^2, the paper's text; condition: one position per layer
    authors       the same with their norm of a convolution and 1e-4 added to ||x||^2; no theorem
    untied        || d f / d z_l ||_F^2 ||x_l||^2, and its sum over layers for S: the sharpness of
                  the network with a weight of its own at every position; any network
    direct        T_l || d f / d z_l ||_F, no sharpness at all; any network
    per_position  sum_t ||g_t||^2 ||p_t||^2 over min_t ||p_t||^2; no zero position
    gram          || d f / d W_l ||_F^2 over the smallest eigenvalue of the positions' Gram matrix:
                  the only general form in the true gradient; positions linearly independent

n images, L layers, T_l the operator norm of layer l.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_AUTHORS_EPSILON = 1e-4

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Network:
    """Terms of one checkpoint; layers in call order. See ``tasks.bound_terms``.

    Attributes:
        num_outputs: N.
        rounding: Relative rounding that a comparison allows for.
        layers: (L,) names.
        positions: (L,) tokens or patches per image.
        norm: (L,) upper ends of the operator norms; NaN where a layer has none.
        authors_norm: (L,) likewise.
        sigma, frobenius, log_volume, rank: (n,) of the image's Jacobian.
        length: (n,) ||x|| of the images.
        total: (n,) squared gradient norm of all parameters.
        layer_sigma, layer_log_volume, layer_rank, layer_length, weight, output,
        position, least_position, least_gram: (L, n). NaN where a layer has none.
        skip: By layer name, (n,).
        reads_image: Whether the first layer, and nothing else, reads the image.
        invariant, adaptive, adaptive_untied: (n,) sides of Eq. 44; NaN unless ``reads_image``.
        num_terms: d of Eq. 44.
    """

    num_outputs: int
    rounding: float
    layers: tuple[str, ...]
    positions: Array
    norm: Array
    authors_norm: Array
    sigma: Array
    frobenius: Array
    log_volume: Array
    rank: Array
    length: Array
    total: Array
    layer_sigma: Array
    layer_log_volume: Array
    layer_rank: Array
    layer_length: Array
    weight: Array
    output: Array
    position: Array
    least_position: Array
    least_gram: Array
    skip: dict[str, Array]
    reads_image: bool
    invariant: Array
    adaptive: Array
    adaptive_untied: Array
    num_terms: float

    @property
    def untied(self) -> Array:
        """(L, n), ``untied`` in place of the squared gradient of a weight."""
        return self.output * self.layer_length**2

    @property
    def untied_total(self) -> Array:
        """(n,), summed over layers."""
        return self.untied.sum(0)


@dataclass(frozen=True)
class Form:
    """One form of the inequalities, with the terms that it takes.

    Attributes:
        gradient: (L, n) squares that stand for the gradient of a layer's weight.
        divisor: (L, n) squares that stand for ||x||^2 beside it.
        total: (n,) that stands for the squared gradient of all parameters; None if the form has
            no sharpness of the network.
        norm: (L,).
        unmet: (L,) why a layer does not meet the conditions; empty where it does.
        conditions: What they are.
    """

    kind: str
    gradient: Array
    divisor: Array
    total: Array | None
    norm: Array
    unmet: list[str]
    conditions: str
    is_theorem: bool = True


def forms_of(network: Network) -> list[Form]:
    """All forms for one network, the default first."""
    square = network.layer_length**2
    dead = (network.layer_length == 0).sum(1)
    shared = [
        f"applies its weight at {p} positions" if p > 1 else "" for p in network.positions.tolist()
    ]
    zero = [f"has a zero input on {k} images" if k else "" for k in dead.tolist()]
    no_norm = ["has no norm of its own" if np.isnan(t) else "" for t in network.norm]
    no_weight = ["has no gradient of its own" if np.isnan(w).any() else "" for w in network.weight]
    blank = [""] * len(network.layers)
    zero_position = _counted(network.least_position <= 0, "has a zero position on {} images")
    dependent = _counted(~(network.least_gram > 0), "has dependent positions on {} images")
    once, nonzero = "each weight applied once per image", "no zero input"
    return [
        Form(
            "untied", network.untied, square, network.untied_total, network.norm,
            _joined(zero, no_norm), nonzero,
        ),
        Form(
            "printed", network.weight, square, network.total, network.norm,
            _joined(shared, zero, no_norm, no_weight), f"{once}, {nonzero}",
        ),
        Form(
            "authors", network.weight, square + _AUTHORS_EPSILON, network.total,
            network.authors_norm, _joined(shared, no_norm, no_weight), once, is_theorem=False,
        ),
        Form(
            "direct", network.output, np.ones_like(square), None, network.norm,
            _joined(blank, no_norm), "none",
        ),
        Form(
            "per_position", network.position, network.least_position**2, None, network.norm,
            _joined(zero_position, no_norm, no_weight), "no zero token or patch",
        ),
        Form(
            "gram", network.weight, network.least_gram, None, network.norm,
            _joined(dependent, no_norm, no_weight), "linearly independent tokens or patches",
        ),
    ]  # fmt: skip


def _joined(*reasons: list[str]) -> list[str]:
    return [" and ".join(r for r in parts if r) for parts in zip(*reasons, strict=True)]


def _counted(bad: Array, text: str) -> list[str]:
    return [text.format(count) if count else "" for count in bad.sum(1).tolist()]
