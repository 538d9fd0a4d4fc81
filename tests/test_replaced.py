"""Other values in the place of parameters: everywhere they are used, and gone afterwards."""

import torch
from torch import nn

from tasks.directional import directional
from tasks.replaced import replaced


class Shared(nn.Module):
    """A module under two names, and a weight that another module holds too."""

    def __init__(self) -> None:
        super().__init__()
        first, other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.layers = nn.ModuleList([first, first, other])
        other.weight = first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def test_a_shared_parameter_has_the_new_value_in_every_place_and_its_own_again_afterwards():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Shared().double(), torch.randn(2, 1, 2, 2).double()
    before = dict(model.named_parameters())
    names = ["layers.0.weight", "layers.0.bias", "layers.2.bias"]
    assert list(before) == names
    values = {name: torch.full_like(p, 0.1 + k) for k, (name, p) in enumerate(before.items())}
    found = replaced(model, values)(x)
    after = dict(model.named_parameters())
    assert list(after) == names
    assert all(after[name] is before[name] for name in names)
    with torch.no_grad():
        for name, parameter in before.items():
            parameter.copy_(values[name])
    torch.testing.assert_close(found, model(x), rtol=1e-12, atol=0)


def test_differentiating_along_a_direction_leaves_a_module_with_two_names_as_it_was():
    model = Shared().double().requires_grad_(False)
    before = dict(model.named_parameters())
    directional(model, torch.ones(2, 1, 2, 2).double(), "identity", before)
    assert all(p is before[name] for name, p in model.named_parameters())
