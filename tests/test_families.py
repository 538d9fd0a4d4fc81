"""A small member of every family: traits, products against differences, values by oracles."""

from __future__ import annotations

import copy

import family_members as families
import numpy as np
import oracles
import pytest
import timm
import torch
from family_traits import found_traits
from torch import nn

from tasks.adaptive_sharpness import AdaptiveSharpness
from tasks.block import Block
from tasks.checkpoints import architecture_family
from tasks.families import FAMILIES, MEMBERS, TRAITS, Member
from tasks.jacobian import forward, jacobian_batch
from tasks.random import generator
from tasks.self_test import self_test
from tasks.sensitivity import NormalizedMls

every_member = pytest.mark.parametrize("member", MEMBERS, ids=families.NAMES)
STEPS = (1e-4, 1e-5, 1e-6)  # of a unit direction; rounding / step is 1e-10 at the last
RHO = 0.1


@every_member
def test_traits_are_those_that_are_found_in_the_network(member: Member):
    fresh = families.build(member)
    assert set(member.traits) == found_traits(fresh, families.images(member)[:1])
    assert architecture_family(member.architecture) == member.family


def test_every_trait_is_found_somewhere_and_every_family_of_the_list_has_a_member():
    assert {trait for member in MEMBERS for trait in member.traits} == set(TRAITS)
    listed = {
        architecture_family(name.partition(".")[0])
        for name in timm.list_models("*vit*", pretrained=True)
        if not name.startswith("test_")
        and (config := timm.get_pretrained_cfg(name)) is not None
        and config.num_classes == 1000
        and config.input_size[-1] <= 384
    }
    assert listed | {"deit"} == set(FAMILIES)


@every_member
def test_products_agree_with_differences_and_with_each_other(member: Member):
    """In float64, along random directions: |J v| to a central difference, <u, J v> = <J^T u, v>."""
    model = oracles.prepare(families.build(member)).double()
    images = families.images(member)[:2].double()
    jacobian = jacobian_batch(model, images, "identity")
    random = torch.Generator().manual_seed(0)
    v = torch.randn(images.shape, generator=random, dtype=torch.float64)
    v /= v.flatten(1).norm(dim=1)[:, None, None, None]
    u = torch.randn(jacobian.logits.shape, generator=random, dtype=torch.float64)
    product, transposed = jacobian.jvp(v), jacobian.vjp(u)

    both = (u * product).sum(1) - (transposed * v).flatten(1).sum(1)
    assert (both.abs() / (u.norm(dim=1) * product.norm(dim=1))).max() < 1e-12
    with torch.no_grad():
        errors = [
            (forward(model, images + h * v) - forward(model, images - h * v)) / (2 * h) - product
            for h in STEPS
        ]
    worst = [float((error.norm(dim=1) / product.norm(dim=1)).max()) for error in errors]
    # A kink within a step of the image shifts the difference by its share of the units.
    assert min(worst) < (1e-4 if "kinks" in member.traits else 1e-7)


@every_member
def test_lanczos_intervals_hold_the_values_of_the_dense_jacobian_in_float64(member: Member):
    model = families.build(member)
    images = families.images(member)[:2]
    found = NormalizedMls(tolerance=1e-3).measure(
        oracles.make_subject(model, images), Block(range(2))
    )
    referee = oracles.make_subject(copy.deepcopy(model).double(), images)
    exact = NormalizedMls(method="dense").measure(referee, Block(range(2)))
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.status == theirs.status == "ok"
        assert ours.lower is not None
        assert ours.upper is not None
        assert ours.lower <= theirs.value <= ours.upper
        assert ours.upper / ours.lower < 1.003


@every_member
def test_adaptive_sharpness_is_that_of_a_loop_over_moved_copies(member: Member):
    """The same noise on cloned weights, one tensor at a time, and an ordinary forward."""
    images, labels = families.images(member), torch.arange(4)
    subject = oracles.make_subject(families.build(member), images, labels)
    rows = AdaptiveSharpness(rho=RHO, group_size=4).measure(subject, Block(range(4), range(2)))
    found = np.array([[r.value for r in rows if r.draw == k] for k in range(2)])

    targets = nn.functional.one_hot(labels, oracles.NUM_CLASSES).double()

    def errors(model: nn.Module) -> np.ndarray:
        with torch.no_grad():
            return (model(images).double().sigmoid() - targets).square().sum(1).numpy()

    sizes = [-(-p.numel() // 16) * 16 for p in subject.model.parameters()]
    base = errors(subject.model)
    for draw in range(2):
        random = generator(subject.seed, "adaptive_sharpness", 0, draw)
        noise = torch.empty(sum(sizes)).normal_(generator=random).split(sizes)
        changes = []
        for sign in (1, -1):
            moved = copy.deepcopy(subject.model)
            for parameter, z in zip(moved.parameters(), noise, strict=True):
                z = z[: parameter.numel()].view(parameter.shape)
                parameter.mul_(1 + sign * RHO * z)
            changes.append(errors(moved) - base)
        expected = sum(changes) / (2 * RHO**2)
        # Float32 logits of moved weights differ by rounding: 1e-5 of an error of order 1, / rho^2,
        # and more where noise moves them far.
        size = float(np.abs(expected).max())
        np.testing.assert_allclose(
            found[draw], expected, rtol=0, atol=max(1e-5 / RHO**2, 1e-4 * size)
        )
        assert size > 0.01


@every_member
def test_the_self_test_measures_rounding_and_no_more(member: Member):
    model, images = families.build(member), families.images(member)[:2]
    single = self_test(oracles.make_subject(copy.deepcopy(model), images))
    assert single.defect < 2e-5
    assert single.float64_note == ""
    double = self_test(oracles.make_subject(model.double(), images))
    assert double.defect <= 1e-13
    assert double.float64_note == "the network is float64"
