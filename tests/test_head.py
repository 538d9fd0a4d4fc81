"""The linear head found by its effect, and the rows of Q^T J against all rows of J."""

from __future__ import annotations

import functools

import oracles
import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from torch import nn

from tasks.head import find_head, head_features, output_basis, subject_head
from tasks.jacobian import dense_jacobian, jacobian_batch, slope
from tasks.measurement import MeasurementError

# Rounding of float64 products through a network, and of a QR and an SVD of a few hundred rows.
TOLERANCE = 1e-12


def images(count: int = 3, seed: int = 5) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)).double()


def distilled(seed: int = 0) -> nn.Module:
    """Averages the logits of two heads on two tokens of 12 features each."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VisionTransformerDistilled(
            img_size=8, patch_size=4, in_chans=1, num_classes=50, embed_dim=12, depth=2, num_heads=3
        )
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0.0, 0.3)
    return model.eval()


# Networks with more outputs than features, and their number of features.
WIDE = {
    "vit": (lambda: oracles.tiny_vit(num_classes=50), 32),
    "vit_average_pool": (
        lambda: oracles.tiny_vit(1, num_classes=50, class_token=False, global_pool="avg"),
        32,
    ),
    "distilled": (distilled, 24),
    "mlp": (lambda: oracles.mlp(hidden=12, outputs=40), 12),
    "cnn": (lambda: oracles.cnn(outputs=120), 96),
}


def basis_rows(model: nn.Module, x: torch.Tensor, output: str) -> torch.Tensor:
    """(B, R, D) rows of Q^T J, with the head as found."""
    jacobian = jacobian_batch(model, x, output)
    basis = output_basis(jacobian.slope, find_head(model, x))
    return torch.stack([jacobian.vjp(u).flatten(1) for u in basis], dim=1)


def check_rows(model: nn.Module, x: torch.Tensor, output: str, num_features: int) -> None:
    rows = basis_rows(model, x, output)
    dense = dense_jacobian(model, x, output).flatten(2)
    assert rows.shape[1] == num_features < dense.shape[1]
    found, expected = torch.linalg.svdvals(rows), torch.linalg.svdvals(dense)
    size = expected[:, :1]
    assert ((found - expected[:, :num_features]).abs() < TOLERANCE * size).all()
    assert (expected[:, num_features:] < TOLERANCE * size).all()
    assert ((rows.norm(dim=1) - dense.norm(dim=1)).abs() < TOLERANCE * size).all()


@pytest.mark.parametrize("output", ["sigmoid", "identity"])
@pytest.mark.parametrize("name", WIDE)
def test_basis_rows_have_the_singular_values_and_column_norms_of_the_jacobian(name, output):
    build, num_features = WIDE[name]
    check_rows(build().double().requires_grad_(False), images(), output, num_features)


def test_a_timm_network_of_1000_classes_needs_192_rows():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    model = model.eval().double().requires_grad_(False)
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    check_rows(model, x, "sigmoid", 192)


@pytest.mark.parametrize("output", ["sigmoid", "identity"])
def test_parameter_jacobians_keep_their_norms_but_for_the_head_which_has_a_closed_form(output):
    model, x = oracles.mlp(hidden=6, outputs=15).double().requires_grad_(False), images(1)
    f = torch.sigmoid if output == "sigmoid" else nn.Identity()
    parameters = dict(model.named_parameters())
    dense = torch.func.jacrev(lambda p: f(torch.func.functional_call(model, p, x))[0])(parameters)
    logits, head = model(x), find_head(model, x)
    assert head is not None
    basis = output_basis(slope(logits, output), head)[:, 0]
    for name, rows in dense.items():
        if not name.startswith(head.names[0]):
            projected = (basis @ rows.flatten(1)).norm()
            assert projected == pytest.approx(float(rows.norm()), rel=TOLERANCE)
    slopes = slope(logits, output).square().sum()
    features = head_features(model, head, x).square().sum()
    weight, bias = (dense[f"{head.names[0]}.{part}"].square().sum() for part in ("weight", "bias"))
    assert float(weight) == pytest.approx(float(slopes * features), rel=TOLERANCE)
    assert float(bias) == pytest.approx(float(slopes), rel=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["vit", "mlp", "cnn"])
def test_the_head_is_the_last_layer_with_its_weight_and_bias(name, dtype):
    model = WIDE[name][0]().to(dtype).requires_grad_(False)
    x = images().to(dtype)
    head = find_head(model, x)
    assert head is not None
    (layer_name,) = head.names
    layer = model.get_submodule(layer_name)
    assert isinstance(layer, nn.Linear)
    assert torch.equal(head.weight, layer.weight.double())
    features = head_features(model, head, x)
    assert features.shape == (len(x), layer.in_features)
    # A matrix product of 96 terms rounds by less than 96 units in the last place of its size.
    rounding = 96 * torch.finfo(dtype).eps
    assert (head.offset - layer.bias).abs().max() < 10 * rounding
    deviation = model(x).double() - features @ head.weight.mT - layer.bias
    assert deviation.abs().max() < rounding * features.norm(dim=1).max() * head.weight.norm()


def test_both_heads_of_a_distilled_network_are_found_with_their_share_of_the_mean():
    model = distilled().double().requires_grad_(False)
    head = find_head(model, images())
    assert head is not None
    assert head.names == ("head", "head_dist")
    assert torch.equal(head.weight, torch.cat([model.head.weight, model.head_dist.weight], 1) / 2)


class _After(nn.Module):
    """A small network whose features and head's output go through a given function."""

    def __init__(self, after, bias: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Linear(64, 6)
            self.gate = nn.Linear(64, 1)
            self.head = nn.Linear(6, 15)
        self.head.bias.data += bias
        self.after = after

    def forward(self, x):
        phi = torch.tanh(self.first(x.flatten(1)))
        return self.after(self, x, phi)


# None of these has logits that are affine in the input of a linear layer. ``_After``'s modules,
# images and features are the arguments.
REFUSED = {
    "softmax": lambda m, x, phi: m.head(phi).log_softmax(1),
    "norm": lambda m, x, phi: nn.functional.normalize(m.head(phi), dim=1),
    "cap": lambda m, x, phi: 30 * torch.tanh(m.head(phi) / 30),
    "far_kink": lambda m, x, phi: (m.head(phi) + 20).relu(),
    "far_clamp": lambda m, x, phi: m.head(phi).clamp(-20, 20),
    "temperature_of_the_image": lambda m, x, phi: m.head(phi) * x.flatten(1).norm(dim=1)[:, None],
    "temperature_of_the_features": lambda m, x, phi: m.head(phi) / phi.norm(dim=1, keepdim=True),
    "hidden_temperature": lambda m, x, phi: m.head(phi) * phi.detach().norm(dim=1, keepdim=True),
    "gate": lambda m, x, phi: m.head(phi) * torch.sigmoid(m.gate(x.flatten(1))),
    "skip_around_the_head": lambda m, x, phi: m.head(phi) + x.flatten(1)[:, :15],
    "hidden_skip": lambda m, x, phi: m.head(phi) + x.detach().flatten(1)[:, :15],
    "bend_below_float32_rounding": lambda m, x, phi: (z := m.head(phi)) + 1e-7 * torch.sin(z),
    "skip_below_float32_rounding": lambda m, x, phi: m.head(phi) + 1e-7 * x.flatten(1)[:, :15],
    "called_twice": lambda m, x, phi: m.head(phi) + m.head(phi * phi),
    "tokens": lambda m, x, phi: m.head(torch.stack([phi, phi**2], dim=1)).mean(1).relu(),
    "not_a_layer": lambda m, x, phi: phi @ m.head.weight.mT,
}
ACCEPTED = {
    "plain": lambda m, x, phi: m.head(phi),
    "by_keyword": lambda m, x, phi: m.head(input=phi),
    "constant_scale_and_shift": lambda m, x, phi: 3 * m.head(phi) - 1,
    "features_changed_afterwards": lambda m, x, phi: [m.head(y := phi + 0), y.mul_(2)][0],
    "kink_before": lambda m, x, phi: m.head(phi.relu()),
    "fixed_temperature": lambda m, x, phi: m.head(phi) / m.head.bias.norm(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", REFUSED)
def test_heads_that_are_followed_by_anything_not_affine_are_refused(name, dtype):
    model = _After(REFUSED[name]).to(dtype).eval().requires_grad_(False)
    x = images().to(dtype)
    assert find_head(model, x) is None
    assert find_head(model, x[:1]) is None


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", ACCEPTED)
def test_heads_are_found_however_they_are_called(name, count):
    model = _After(ACCEPTED[name]).double().eval().requires_grad_(False)
    x = images(count)
    head = find_head(model, x)
    assert head is not None
    assert head.names == ("head",)
    expected = head_features(model, head, x) @ head.weight.mT + head.offset
    assert (model(x) - expected).abs().max() < TOLERANCE
    check_rows(model, x, "sigmoid", 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_image_whose_features_are_all_zero_does_not_hide_the_head(dtype):
    torch.manual_seed(0)
    hidden, last = nn.Linear(64, 6, bias=False), nn.Linear(6, 4, bias=False)
    model = nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), last, oracles.Times(0.7)).to(dtype)
    x = images(2).to(dtype)
    hidden.weight.data[:] = hidden.weight.abs() * x[0].sign().flatten()
    x[1] = -x[0]  # dead by construction: every hidden unit is negative
    head = find_head(model.requires_grad_(False), x)
    assert head is not None
    assert not head_features(model, head, x)[1].any()


def test_a_layer_that_reads_one_vector_for_all_images_is_no_candidate():
    """MaxViT's table of relative positions, in windows of one pixel."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Linear(2, 64), nn.Linear(64, 10)
            self.place = torch.zeros(1, 1, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head((x.flatten(1) + self.table(self.place)[0]).tanh())

    head = find_head(Positions().requires_grad_(False), images().float())
    assert head is not None
    assert head.names == ("head",)


def test_networks_without_a_linear_layer_have_no_head_and_unit_vectors_as_basis():
    model, x = oracles.worked_example()
    model.requires_grad_(False)
    assert find_head(model, x) is None
    basis = output_basis(torch.rand(2, 2, dtype=torch.float64), None)
    assert torch.equal(basis, torch.eye(2).double()[:, None].expand(2, 2, 2))


def test_networks_with_fewer_outputs_than_features_use_unit_vectors():
    model = oracles.mlp().double().requires_grad_(False)
    head = find_head(model, images())
    assert head is not None
    slopes = slope(model(images()), "sigmoid")
    basis = output_basis(slopes, head)
    assert torch.equal(basis, torch.eye(10).double()[:, None].expand(10, 3, 10))


def test_logits_that_are_not_finite_are_an_error_and_not_a_missing_head():
    model = _After(lambda m, x, phi: m.head(phi) / 0).double().requires_grad_(False)
    with pytest.raises(MeasurementError, match="expected finite logits"):
        find_head(model, images())


def test_finding_leaves_model_and_images_as_they_were():
    model, x = oracles.cnn(outputs=120).double().requires_grad_(False), images()
    before, logits = x.clone(), model(x.clone())
    find_head(model, x)
    assert torch.equal(x, before)
    assert torch.equal(model(x), logits)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_head_is_found_with_fused_attention_on():
    model = oracles.tiny_vit(num_classes=50).requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    head = find_head(model, images().float())
    assert head is not None
    assert head.names == ("head",)


def test_the_head_of_a_subject_is_looked_for_once():
    subject = oracles.make_subject(oracles.mlp(), images())
    x = subject.batch([0, 1]).inputs
    assert subject_head(subject, x) is subject_head(subject, x)


def _head_of_rank(rank: int) -> tuple[nn.Module, torch.Tensor]:
    model = oracles.mlp(hidden=12, outputs=40).double()
    layer = model[-1]
    u, s, v = torch.linalg.svd(layer.weight.data, full_matrices=False)
    layer.weight.data = (u[:, :rank] * s[:rank]) @ v[:rank]
    return model.requires_grad_(False), images()


@pytest.mark.parametrize("rank", [0, 1, 11])
def test_rank_deficient_heads_have_an_orthonormal_basis_that_loses_nothing(rank):
    model, x = _head_of_rank(rank)
    basis = output_basis(slope(model(x), "sigmoid"), find_head(model, x)).transpose(0, 1)
    grams = basis @ basis.mT
    assert (grams - torch.eye(12)).abs().max() < TOLERANCE
    if rank:
        check_rows(model, x, "sigmoid", 12)


@pytest.mark.parametrize("logit", [-1e3, -700.0, -46.0, 46.0, 700.0, 1e3])
@pytest.mark.parametrize("saturated", [1, 38, 40])
def test_saturated_sigmoids_have_an_orthonormal_basis_that_spans_the_jacobian(saturated, logit):
    """Slopes of 1e-20, of 1e-304 (whose squares are 0), and exactly 0."""
    model, x = _head_of_rank(12)
    logits = model(x)
    logits[:, :saturated] += logit
    slopes = slope(logits, "sigmoid")
    head = find_head(model, x)
    assert head is not None
    basis = output_basis(slopes, head).transpose(0, 1)
    assert (basis @ basis.mT - torch.eye(12)).abs().max() < TOLERANCE
    scaled = slopes / slopes.amax(1, keepdim=True).clamp(min=5e-324)
    factor = scaled[:, :, None] * head.weight
    lost = factor - basis.mT @ (basis @ factor)
    assert lost.abs().max() <= TOLERANCE * factor.abs().max()


def test_the_sign_of_the_basis_is_fixed_and_images_do_not_change_each_others():
    model = oracles.mlp(hidden=12, outputs=40).double().requires_grad_(False)
    x = images()
    head = find_head(model, x)
    assert head is not None
    slopes = slope(model(x), "sigmoid")
    basis = output_basis(slopes, head)
    triangle = torch.einsum("rbn,bn,nd->brd", basis, slopes, head.weight)
    assert (triangle.diagonal(dim1=1, dim2=2) > 0).all()
    assert triangle.tril(-1).abs().max() < TOLERANCE
    alone = functools.partial(output_basis, head=head)
    assert torch.equal(basis, torch.cat([alone(s[None]) for s in slopes], dim=1))
