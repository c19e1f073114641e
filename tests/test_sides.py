"""A side's gradients as one tensor, the guard against steps that are not finite, learning rates."""

import copy

import pytest
import torch

from benchmarks.faults import same_state
from conftest import take_step
from utils.options import Source, TrainOptions
from utils.sides import Side, learning_rate_factor, make_side


def test_flat_gradients_are_the_gradients():
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 2, 1))
    layers = layers.to(memory_format=torch.channels_last)
    loss = layers(torch.rand(2, 3, 6, 6)).square().sum()
    expected = torch.autograd.grad(loss, list(layers.parameters()), retain_graph=True)
    before = [p.detach().clone() for p in layers.parameters()]
    norm = take_step(Side(layers.parameters(), torch.optim.SGD(layers.parameters(), lr=0.1)), loss, clip=0.5)
    total = torch.cat([g.flatten() for g in expected]).norm()
    assert total > 0.5
    torch.testing.assert_close(norm, total)
    for parameter, old, gradient in zip(layers.parameters(), before, expected, strict=True):
        torch.testing.assert_close(parameter, old - 0.1 * gradient * 0.5 / total)


@pytest.mark.parametrize("kind, how", [
    (torch.optim.RMSprop, {"weight_decay": 0.1}), (torch.optim.AdamW, {"fused": True})])
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_no_step_along_a_gradient_that_is_not_finite(kind, how, factor):
    layer = torch.nn.Linear(3, 2)
    side, x = Side(layer.parameters(), kind(layer.parameters(), 0.1, **how)), torch.rand(4, 3)
    take_step(side, layer(x).square().sum())
    before, state = layer.weight.detach().clone(), copy.deepcopy(side.optimizer.state_dict()["state"])
    assert side.skipped == 0
    assert not take_step(side, layer(x).square().sum() * factor).isfinite() and side.skipped == 1
    assert torch.equal(layer.weight, before) and same_state(side.optimizer.state_dict()["state"], state)
    take_step(side, layer(x).square().sum())
    assert layer.weight.isfinite().all() and not torch.equal(layer.weight, before) and side.skipped == 1


@pytest.mark.parametrize("kind", ["rmsprop", "adamw"])
def test_a_loaded_optimizer_is_recorded_as_its_own_run_says(kind):
    """Whether the checkpoint's was or not; on CUDA torch moves the state there by it."""
    sides = [make_side(kind, torch.nn.Linear(3, 2).parameters(), 0.1, recorded=how) for how in (True, False)]
    states = [side.optimizer.state_dict() for side in sides]
    for side, state in zip(sides, states[::-1], strict=True):
        side.optimizer.load_state_dict(state)
    assert [side.optimizer.param_groups[0]["capturable"] for side in sides] == [True, False]


def test_adamw_without_decay_is_adam():
    ours = torch.nn.Linear(3, 2)
    theirs = copy.deepcopy(ours)
    adam = torch.optim.Adam(theirs.parameters(), 0.1, (0.8, 0.9), eps=1e-15)
    sides = make_side("adamw", ours.parameters(), 0.1, betas=(0.8, 0.9)), Side(theirs.parameters(), adam)
    for x in torch.rand(3, 4, 3):
        for layer, side in zip((ours, theirs), sides, strict=True):
            take_step(side, layer(x).square().sum())
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_learning_rate_schedules():
    source = Source(name="noise", bundled=["coffee.png"], degradation="noise", levels=[25])
    options = TrainOptions(name="run", sources=[source], steps=1000, schedule=50.0)
    factors = [learning_rate_factor(options, 500, 1000, epoch) for epoch in (0, 49.9, 50, 100)]
    assert factors == pytest.approx([1, 1, 0.1, 0.01])
    options.schedule, options.warmup = "cosine", 10
    factors = [learning_rate_factor(options, step, 110, 0.0) for step in (0, 9, 10, 60, 110)]
    assert factors == pytest.approx([0.1, 1, 1, 0.5, 0])
