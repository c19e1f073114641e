"""Gradients as one tensor."""

import copy

import pytest
import torch

from benchmarks.faults import same_state
from utils.gradients import FlatGradients


def test_flat_gradients_are_the_gradients():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 2, 1))
    layers = layers.to(memory_format=torch.channels_last)
    loss = layers(torch.rand(2, 3, 6, 6)).square().sum()
    expected = torch.autograd.grad(loss, list(layers.parameters()), retain_graph=True)
    before = [p.detach().clone() for p in layers.parameters()]
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
    norm = FlatGradients(list(layers.parameters())).descend(loss, optimizer, clip=0.5)
    total = torch.cat([g.flatten() for g in expected]).norm()
    assert total > 0.5
    torch.testing.assert_close(norm, total)
    for parameter, old, gradient in zip(layers.parameters(), before, expected, strict=True):
        torch.testing.assert_close(parameter, old - 0.1 * gradient * 0.5 / total)


@pytest.mark.parametrize("kind, how", [
    (torch.optim.RMSprop, {"weight_decay": 0.1}), (torch.optim.Adam, {"fused": True}),
    (torch.optim.AdamW, {"fused": True}),
])
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_no_step_along_a_gradient_that_is_not_finite(kind, how, factor):
    layer = torch.nn.Linear(3, 2)
    optimizer, flat = kind(layer.parameters(), 0.1, **how), FlatGradients(list(layer.parameters()))
    x = torch.rand(4, 3)
    flat.descend(layer(x).square().sum(), optimizer)
    before, state = layer.weight.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
    assert not flat.descend(layer(x).square().sum() * factor, optimizer).isfinite()
    assert torch.equal(layer.weight, before) and same_state(optimizer.state_dict()["state"], state)
    flat.descend(layer(x).square().sum(), optimizer)
    assert layer.weight.isfinite().all() and not torch.equal(layer.weight, before)
