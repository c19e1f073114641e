"""Strips against the whole image; the network that they were made of stays as it is."""

import copy
from unittest import mock

import pytest
import torch

from conftest import SMALL
from models import strips
from models.baryir import BACKBONES, BaryIR
from models.restormer import TransformerBlock
from models.strips import in_strips
from utils.evaluation import restore


@pytest.fixture(params=BACKBONES)
def net(request) -> BaryIR:
    return BaryIR(**SMALL, backbone=request.param)


def state(net: torch.nn.Module) -> list:
    """Everything that a network's modules hold, by identity."""
    return [(name, type(module), {key: id(value) for key, value in vars(module).items()},
             [id(child) for child in module.children()]) for name, module in net.named_modules()]


@pytest.mark.parametrize("barycenter", [True, False])
@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_strips_give_what_the_whole_image_gives(backbone, barycenter):
    """Of any number of rows; the stages leave the input, z and the skips as they are."""
    net = BaryIR(**SMALL, backbone=backbone, barycenter=barycenter)
    for size, several in (((24, 40), (2, 5)), ((9, 30), (1, 3, 8)), ((1, 50), (1, 5))):
        degraded = torch.rand(2, 3, *size)
        before, wholes = degraded.clone(), net(degraded)
        for rows in several:
            for output, whole in zip(in_strips(net, rows)(degraded), wholes, strict=True):
                torch.testing.assert_close(output, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))
            assert torch.equal(degraded, before)
    twin = in_strips(net, 5)
    z, skips = twin.encode(degraded)
    kept, b = [tensor.clone() for tensor in (z, *skips)], twin.transport(z)
    first, second = (twin.decode(b, z - b, skips) for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(now, before) for now, before in zip([z, *skips], kept, strict=True))


@torch.no_grad()
def test_blocks_of_another_backbone_are_whole(monkeypatch):
    """Here some that see the whole map."""
    class Own(TransformerBlock):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + x.mean(dim=(2, 3), keepdim=True)

    monkeypatch.setitem(BACKBONES, "own", (Own, None))
    net, degraded = BaryIR(**SMALL, backbone="own"), torch.rand(1, 3, 24, 40)
    for output, whole in zip(in_strips(net, 5)(degraded), net(degraded), strict=True):
        torch.testing.assert_close(output, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))


def test_strips_leave_no_trace(net, monkeypatch):
    """Meanwhile, and after an error: the network computes, learns, is copied; the twin has its weights."""
    net.recompute_blocks()                                      # as in training
    inside, degraded, before = [], torch.rand(1, 3, 24, 40), state(net)
    whole = net(degraded)[0]

    def meanwhile(block: strips.BlockInStrips, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            inside.append([each(degraded)[0] for each in (net, copy.deepcopy(net))] if not inside else [])
        return forward(block, x)

    twin, forward = in_strips(net, 5), strips.BlockInStrips.forward
    monkeypatch.setattr(strips.BlockInStrips, "forward", meanwhile)
    with torch.no_grad():
        torch.testing.assert_close(twin(degraded)[0], whole, rtol=1e-4, atol=1e-5)
    assert len(inside) == sum(isinstance(module, TransformerBlock) for module in net.modules())
    assert all(torch.equal(restored, whole) and restored.requires_grad for restored in inside[0])

    monkeypatch.setattr(strips.BlockInStrips, "forward", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        in_strips(net, 5)(degraded)
    monkeypatch.undo()
    assert state(net) == before
    for copied in (net, copy.deepcopy(net)):
        restored = copied(degraded)[0]
        assert torch.equal(restored, whole) and restored.requires_grad
        restored.mean().backward()
        assert all(parameter.grad is not None for parameter in copied.decoder.parameters())
    with torch.no_grad():
        net.output.weight.mul_(2)
        torch.testing.assert_close(twin(degraded)[0], net(degraded)[0], rtol=1e-4, atol=1e-5)


def test_strips_bound_the_memory(net, monkeypatch):
    """On a CPU the rows follow from the width; no convolution sees more of them, nor the whole image."""
    seen, cpu, convolve = [], torch.device("cpu"), torch.nn.functional.conv2d
    monkeypatch.setattr(strips, "CPU_STRIP", 8 * net.widest * 40 * 4)
    assert [strips.strip_rows(net, height, 40, 4, cpu) for height in (64, 8)] == [8, 0]

    def conv2d(x: torch.Tensor, *rest, **how) -> torch.Tensor:
        seen.append(x.shape[2])
        return convolve(x, *rest, **how)

    monkeypatch.setattr(torch.nn.functional, "conv2d", conv2d)
    image = torch.rand(1, 3, 64, 40)
    restored = restore(net.eval(), image)
    assert max(seen) == 8 + 3                                    # two rows seen before, one of padding
    for strip, precision, tolerance in ((0, "float32", 1e-5), (7, "float32", 1e-5), (7, "bfloat16", 0.02)):
        torch.testing.assert_close(restore(net, image, strip, precision), restored, rtol=0, atol=tolerance)


@pytest.mark.parametrize("how", [
    {"kernel_size": 5, "padding": 2}, {"kernel_size": 3, "stride": 2, "padding": 1}, {"kernel_size": 3},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, {"kernel_size": 3, "padding": 1}])
def test_convolutions_of_other_backbones(how):
    """Those that strips would get wrong stay whole."""
    net, x = torch.nn.Sequential(torch.nn.Conv2d(3, 3, **how)), torch.rand(1, 3, 24, 20)
    torch.testing.assert_close(in_strips(net, 8)(x), net(x))
