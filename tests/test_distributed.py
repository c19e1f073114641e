"""A side's gradients as one tensor, and the guard against steps that are not finite."""

import copy

import pytest
import torch

from benchmarks.faults import same_state
from utils.distributed import Side, make_side


def step(side: Side, loss: torch.Tensor, clip: float = 0.0) -> torch.Tensor:
    """A step of a side as train.py takes it; returns the norm of its gradient."""
    side.thaw()
    loss.backward()
    norm = side.average_and_clip(loss, clip)
    side.optimizer.step()
    return norm


def test_flat_gradients_are_the_gradients():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 2, 1))
    layers = layers.to(memory_format=torch.channels_last)
    loss = layers(torch.rand(2, 3, 6, 6)).square().sum()
    expected = torch.autograd.grad(loss, list(layers.parameters()), retain_graph=True)
    before = [p.detach().clone() for p in layers.parameters()]
    norm = step(Side(layers.parameters(), torch.optim.SGD(layers.parameters(), lr=0.1)), loss, clip=0.5)
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
    side, x = Side(layer.parameters(), kind(layer.parameters(), 0.1, **how)), torch.rand(4, 3)
    step(side, layer(x).square().sum())
    before, state = layer.weight.detach().clone(), copy.deepcopy(side.optimizer.state_dict()["state"])
    assert not step(side, layer(x).square().sum() * factor).isfinite()
    assert torch.equal(layer.weight, before) and same_state(side.optimizer.state_dict()["state"], state)
    step(side, layer(x).square().sum())
    assert layer.weight.isfinite().all() and not torch.equal(layer.weight, before)


@pytest.mark.parametrize("kind", ["rmsprop", "adamw"])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_loaded_optimizer_is_recorded_as_its_own_run_says(kind, recorded):
    """Whether the checkpoint's was or not; on CUDA torch moves the state there by it."""
    layer = torch.nn.Linear(3, 2)
    ours, other = (make_side(kind, layer.parameters(), 0.1, recorded=r) for r in (recorded, not recorded))
    ours.optimizer.load_state_dict(other.optimizer.state_dict())
    assert [group["capturable"] for group in ours.optimizer.param_groups] == [recorded]
