"""What the backward pass recomputes, gradients as one tensor, compiled stages."""

import copy
import functools
import shutil

import pytest
import torch
from torch._dynamo.utils import counters
from utils.memory import recompute

from benchmarks.faults import same_state
from conftest import SMALL
from models.baryir import BaryIR, call, compile_stages
from models.restormer import TransformerBlock
from utils.distributed import Side


def gradients(net: BaryIR, run=call) -> tuple[torch.Tensor, ...]:
    """Gradients of some loss of some images."""
    torch.manual_seed(1)
    restored, z, b = net(torch.rand(2, 3, 24, 40), run)
    return torch.autograd.grad(restored.square().mean() + (z * b).mean(), list(net.parameters()))


@pytest.mark.parametrize("everything", [False, True])
def test_recomputing_gives_the_same_gradients(everything):
    torch.manual_seed(0)
    net = BaryIR(**SMALL)
    ours = gradients(net, functools.partial(recompute, everything=everything))
    for gradient, reference in zip(ours, gradients(net)):
        torch.testing.assert_close(gradient, reference)


def step(side: Side, loss: torch.Tensor, clip: float = 0.0) -> torch.Tensor:
    """A step of a side as train.py takes it; returns the norm of its gradient."""
    side.thaw()
    loss.backward()
    norm = side.settle(loss, clip)
    side.optimizer.step()
    return norm


def test_flat_gradients_are_the_gradients():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 2, 1)).to(memory_format=torch.channels_last)
    loss = layers(torch.rand(2, 3, 6, 6)).square().sum()
    expected = torch.autograd.grad(loss, list(layers.parameters()), retain_graph=True)
    before = [p.detach().clone() for p in layers.parameters()]
    norm = step(Side(layers.parameters(), torch.optim.SGD(layers.parameters(), lr=0.1)), loss, clip=0.5)
    total = torch.cat([g.flatten() for g in expected]).norm()
    assert total > 0.5
    torch.testing.assert_close(norm, total)
    for parameter, old, gradient in zip(layers.parameters(), before, expected, strict=True):
        torch.testing.assert_close(parameter, old - 0.1 * gradient * 0.5 / total)


@pytest.mark.parametrize("kind, how", [(torch.optim.RMSprop, {"weight_decay": 0.1}), (torch.optim.Adam, {"fused": True}),
                                       (torch.optim.AdamW, {"fused": True})])
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


def test_compiled_stages_take_images_of_any_size():
    """The same results, and no graph for each new size. (PyTorch has other kernels below 20,480 numbers, as in tiny images.)"""
    torch.manual_seed(0)
    net = BaryIR(width=8, encoder_blocks=[1, 0], decoder_blocks=[0, 0], residual_blocks=[0], heads=[1, 2, 4], latent_blocks=0,
                 transport_blocks=1, refinement_blocks=0).eval()
    images = [torch.rand(1, 3, *size) for size in ((112, 96), (128, 100), (96, 160), (124, 148))]
    with torch.inference_mode():
        expected = [net(image)[0] for image in images]
        compile_stages(net, dynamic=True, backend="aot_eager")              # without the minutes of the default's C++
        counters.clear()
        for image, reference in zip(images, expected):
            torch.testing.assert_close(net(image)[0], reference, rtol=1e-4, atol=1e-5)
        assert counters["stats"]["unique_graphs"] == 3


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_block_copies_no_map_into_another_layout():
    torch.manual_seed(0)
    block = TransformerBlock(6, 1).to(memory_format=torch.channels_last).requires_grad_(False)
    image = torch.rand(1, 6, 16, 24).to(memory_format=torch.channels_last)
    compiled = torch.compile(block, dynamic=True)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(image), block(image))
        with torch.profiler.profile() as profile:
            compiled(image)
    names = [event.key for event in profile.key_averages()]
    assert "aten::mkldnn_convolution" in names and "aten::copy_" not in names
