"""The paper's inequalities between flatness and compression, evaluated on measured terms.

Every check has a left and a right side in the units of what is bounded; right sides take the upper
end of each layer's operator norm, so they are not too small. Sums run over images i and layers l; n
images, N outputs, S the sharpness of Eq. 3 over all parameters, T_l the operator norm of layer l,
W its weight, x its input, q the mean of 1 / ||x||^2 over images.

A weight that is shared by tokens or patches asks for another form of each (``tasks.bound_forms``).

Volumes are compared per dimension: both sides of Eq. 9 and 10 to the power 1 / N, Eq. 8 as
r dV^(2/r) <= ||A||_F^2. They over- and underflow otherwise, and log10 of their ratio would say how
many outputs there are.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tasks.bound_forms import Array, Form, Network, forms_of
from tasks.log_mean import log_sum
from tasks.measurement import Check


def evaluate(network: Network) -> list[Check]:
    """All checks of a checkpoint, in the order of the paper's equations."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        forms = forms_of(network)
        return [
            *_eq6(network, forms),
            *_eq8(network),
            *_eq9(network, forms),
            *_eq10(network, forms),
            *_eq11(network, forms),
            *_eq12(network, forms),
            *_eq17(network, forms),
            *_eq35(network, forms),
            *_eq44(network),
            *_eq48(network, forms),
        ]


def mls_bound(network: Network, kind: str) -> tuple[float, Array]:
    """Right side of Eq. 11 and the images' influence on it (``tasks.linearised``)."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        form = _form(network, kind)
        if form.total is None:
            parts = form.norm[0] * np.sqrt(form.gradient[0] / form.divisor[0])
            return float(parts.mean()), parts - parts.mean()
        return _root(form.norm[0] ** 2 / form.divisor[0], form.total)


def nmls_bound(network: Network, kind: str) -> tuple[float, Array]:
    """Right side of Eq. 12 and the images' influence on it."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        form = _form(network, kind)
        if form.total is None:
            parts = (form.norm[:, None] * np.sqrt(form.gradient / form.divisor)).sum(0)
            return float(parts.mean()), parts - parts.mean()
        return _root((form.norm[:, None] ** 2 / form.divisor).sum(0), form.total)


def _root(a: Array, s: Array) -> tuple[float, Array]:
    """(mean a * mean s)^(1/2) and the images' influence on it."""
    value = np.sqrt(a.mean() * s.mean())
    return float(value), value * ((a / a.mean() - 1) + (s / s.mean() - 1)) / 2


def _form(network: Network, kind: str) -> Form:
    return next(form for form in forms_of(network) if form.kind == kind)


def _eq6(network: Network, forms: list[Form]) -> Iterator[Check]:
    """Mean of ||J||_F^2 <= (T^2 / min ||x||^2) S for k = 2."""
    for form in forms:
        largest = form.norm[0] ** 2 / form.divisor[0].min()
        middle = form.norm[0] ** 2 * (form.gradient[0] / form.divisor[0]).mean()
        right = middle if form.total is None else largest * form.total.mean()
        yield _first(network, form, "6", (network.frobenius**2).mean(), right)


def _eq8(network: Network) -> Iterator[Check]:
    """Mean of r dV^(2/r) <= that of ||J||_F^2; with N for r as printed, rank N is a condition."""
    right = (network.frobenius**2).mean()
    for kind, size in (("rank", network.rank), ("printed", np.full(1, network.num_outputs))):
        each = size * np.exp(2 * network.log_volume / np.maximum(size, 1))
        left = each.mean()
        deficient = int((network.rank < network.num_outputs).sum()) if kind == "printed" else 0
        unmet = [f"the rank is below N on {deficient} images"] if deficient else []
        conditions = "rank N at every image" if kind == "printed" else "none"
        yield _check(network, "8", kind, left, right, unmet, conditions)


def _eq9(network: Network, forms: list[Form]) -> Iterator[Check]:
    """LVR^(1/N) against the right side of Eq. 9 to the power 1/N."""
    left = _per_dimension(_log_mean(network.log_volume), network)
    for form in forms:
        if form.total is not None:
            terms = np.log(form.norm[0]) - np.log(form.divisor[0]) / 2
            right = _volume_side(terms, form.total, network)
            deficient = int((network.rank < network.num_outputs).sum())
            yield _first(
                network, form, "9", left, right,
                [f"the rank is below N on {deficient} images"] if deficient else [],
                ", rank N at every image",
            )  # fmt: skip


def _eq10(network: Network, forms: list[Form]) -> Iterator[Check]:
    """NVR^(1/N) against the right side of Eq. 10 to the power 1/N."""
    logs = [_log_mean(volumes) for volumes in network.layer_log_volume]
    left = _per_dimension(log_sum(np.array(logs)), network)
    deficient = int((network.layer_rank < network.num_outputs).any(1).sum())
    for form in forms:
        if form.total is not None:
            terms = np.log(form.norm)[:, None] - np.log(form.divisor) / 2
            right = _volume_side(terms.ravel(), form.total, network)
            yield _every(
                network, form, "10", left, right,
                [f"the rank is below N at {deficient} layers"] if deficient else [],
                ", rank N at every layer",
            )  # fmt: skip


def _eq11(network: Network, forms: list[Form]) -> Iterator[Check]:
    for form in forms:
        if form.total is None:
            right = form.norm[0] * np.sqrt(form.gradient[0] / form.divisor[0]).mean()
        else:
            right = form.norm[0] * np.sqrt((1 / form.divisor[0]).mean() * form.total.mean())
        yield _first(network, form, "11", network.sigma.mean(), right)


def _eq12(network: Network, forms: list[Form]) -> Iterator[Check]:
    """Eq. 12, and its sharper layer by layer form 12b."""
    left = network.layer_sigma.mean(1).sum()
    for form in forms:
        if form.total is None:
            right = (form.norm * np.sqrt(form.gradient / form.divisor).mean(1)).sum()
        else:
            constant = (form.norm[:, None] ** 2 / form.divisor).sum(0).mean()
            right = np.sqrt(constant * form.total.mean())
        yield _every(network, form, "12", left, right)
    for form in forms:
        if form.total is not None:
            inverse = np.sqrt((1 / form.divisor).mean(1))
            right = (form.norm * inverse * np.sqrt(form.gradient.mean(1))).sum()
            yield _every(network, form, "12b", left, right)


def _eq17(network: Network, forms: list[Form]) -> Iterator[Check]:
    """| ||K||_2 - ||J||_2 | <= (T / ||x||) || d f / d W ||_F at layers beside a skip connection."""
    for k, layer in enumerate(network.layers):
        for form in forms:
            if layer in network.skip and form.kind in ("untied", "printed", "direct"):
                right = form.norm[k] * np.sqrt(form.gradient[k] / form.divisor[k]).mean()
                unmet = [f"layer {layer} {form.unmet[k]}"] if form.unmet[k] else []
                left = network.skip[layer].mean()
                yield _check(
                    network, "17", form.kind, left, right, unmet, form.conditions, layer=layer
                )


def _eq35(network: Network, forms: list[Form]) -> Iterator[Check]:
    """Sum of harmonic mean input times MLS_l <= matrix-normalised sharpness."""
    for form in forms:
        if form.kind in ("untied", "printed"):
            harmonic = (1 / form.divisor).mean(1) ** -0.5
            left = (harmonic * network.layer_sigma.mean(1)).sum()
            right = (form.norm * np.sqrt(form.gradient.mean(1))).sum()
            yield _every(network, form, "35", left, right)


def _eq44(network: Network) -> Iterator[Check]:
    """IIMLS <= d S_adaptive of the first layer."""
    sides = {"untied": network.adaptive_untied, "printed": network.adaptive}
    for kind, adaptive in sides.items():
        unmet = _first_unmet(network)
        if kind == "printed" and len(network.layers) and network.positions[0] > 1:
            unmet.append(f"layer {network.layers[0]} applies its weight at several positions")
        once = "each weight applied once per image, " if kind == "printed" else ""
        yield _check(
            network, "44", kind, network.invariant.mean(), network.num_terms * adaptive.mean(),
            unmet, f"{once}the first layer alone reads the image",
        )  # fmt: skip


def _eq48(network: Network, forms: list[Form]) -> Iterator[Check]:
    """A <= B <= C <= D."""
    for form in forms:
        if form.total is not None:
            norm, gradient, inverse = form.norm[0], form.gradient[0], 1 / form.divisor[0]
            a = network.sigma.mean()
            b = norm * np.sqrt(gradient * inverse).mean()
            c = norm * np.sqrt(inverse.mean() * gradient.mean())
            d = norm * np.sqrt(inverse.mean() * form.total.mean())
            for name, left, right in (("A<=B", a, b), ("B<=C", b, c), ("C<=D", c, d)):
                yield _first(network, form, f"48 {name}", left, right)


def _first(
    network: Network, form: Form, bound: str, left: float, right: float,
    also: list[str] | None = None, conditions: str = "",
) -> Check:  # fmt: skip
    """Check that rests on the first layer."""
    unmet = _first_unmet(network)
    if form.unmet[0]:
        unmet.append(f"layer {network.layers[0]} {form.unmet[0]}")
    stated = f"the first layer alone reads the image, {form.conditions}{conditions}"
    return _check(
        network, bound, form.kind, left, right, [*unmet, *(also or [])], stated,
        is_theorem=form.is_theorem,
    )  # fmt: skip


def _every(
    network: Network, form: Form, bound: str, left: float, right: float,
    also: list[str] | None = None, conditions: str = "",
) -> Check:  # fmt: skip
    """Check that rests on all layers."""
    bad = [f"layer {n} {why}" for n, why in zip(network.layers, form.unmet, strict=True) if why]
    more = [f"and {len(bad) - 2} more layers"] if len(bad) > 2 else []
    return _check(
        network, bound, form.kind, left, right, [*bad[:2], *more, *(also or [])],
        form.conditions + conditions, is_theorem=form.is_theorem,
    )  # fmt: skip


def _check(
    network: Network, bound: str, kind: str, left: float, right: float, unmet: list[str],
    conditions: str, *, layer: str | None = None, is_theorem: bool = True,
) -> Check:  # fmt: skip
    left, right = float(left), float(right)
    defined = np.isfinite(left) and not np.isnan(right) and np.isfinite(right)
    not_met = f"; not met: {', '.join(unmet)}" if unmet else ""
    return Check(
        bound=bound,
        kind=kind,
        left=left,
        right=right,
        holds=bool(left <= right * (1 + network.rounding)) if defined else None,
        is_theorem=is_theorem,
        conditions_met=not unmet,
        conditions=conditions + not_met,
        num_samples=len(network.sigma),
        layer=layer,
    )


def _first_unmet(network: Network) -> list[str]:
    return [] if network.reads_image else ["the first layer is not alone in reading the image"]


def _volume_side(terms: Array, total: Array, network: Network) -> float:
    """Right side of Eq. 9 or 10 to the power 1/N, from log(T / ||x||)."""
    size, count = network.num_outputs, len(total)
    constant = log_sum(2 * size * terms) / 2 - np.log(count)
    return float(np.exp(constant / size + np.log(count * total.mean() / size) / 2))


def _per_dimension(log_volume: float, network: Network) -> float:
    return float(np.exp(log_volume / network.num_outputs))


def _log_mean(logs: Array) -> float:
    return log_sum(logs) - float(np.log(len(logs)))
