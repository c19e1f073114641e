"""What the backward pass recomputes: the same gradients from less memory, for a network and its copies."""

import copy
import pickle

import pytest
import torch
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

from models.baryir import BACKBONES, BaryIR, compile_stages
from models.recompute import RecomputedBlock, recompute
from models.restormer import TransformerBlock
from utils.errors import InputError

TINY = dict(width=8, encoder_blocks=[1, 0], decoder_blocks=[1, 0], residual_blocks=[0], heads=[1, 2, 4],
            latent_blocks=0, transport_blocks=1, refinement_blocks=0)


def gradients(net: BaryIR) -> tuple[torch.Tensor, ...]:
    """Gradients of some loss of some images."""
    torch.manual_seed(1)
    restored, z, b = net(torch.rand(2, 3, 24, 40))
    return torch.autograd.grad(restored.square().mean() + (z * b).mean(), list(net.parameters()))


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("how", ["cheap", "all"])
def test_recomputing_gives_the_same_gradients(how, backbone):
    torch.manual_seed(0)
    net = BaryIR(**TINY, backbone=backbone)
    names, references = list(net.state_dict()), gradients(net)
    recompute(net, how)
    assert list(net.state_dict()) == names and sum(isinstance(m, RecomputedBlock) for m in net.modules()) == 5
    for gradient, reference in zip(gradients(net), references, strict=True):
        torch.testing.assert_close(gradient, reference)
    recompute(net, "none")
    assert all(type(m) is TransformerBlock for m in net.modules() if isinstance(m, TransformerBlock))


def test_what_the_backward_pass_computes_again():
    """Convolutions of a block: none; all but the two wide ones and the last one; all but the last one."""
    class Count(TorchDispatchMode):
        convolutions = 0

        def __torch_dispatch__(self, operation, types, arguments=(), options=None):
            self.convolutions += operation is torch.ops.aten.convolution.default
            return operation(*arguments, **(options or {}))

    net, counts = BaryIR(**TINY), {}
    for how in ("none", "cheap", "all"):
        recompute(net, how)
        restored, _, _ = net(torch.rand(1, 3, 16, 16))
        with Count() as count:
            restored.mean().backward()
        counts[how] = count.convolutions
    blocks = sum(isinstance(module, TransformerBlock) for module in net.modules())
    assert counts == {"none": 0, "cheap": 8 * blocks, "all": 10 * blocks}


@pytest.mark.parametrize("copied", [
    copy.deepcopy, lambda net: AveragedModel(net).module, lambda net: pickle.loads(pickle.dumps(net)),
], ids=["deepcopy", "average", "pickle"])
def test_copies_recompute_with_their_own_weights(copied):
    torch.manual_seed(0)
    net = BaryIR(**TINY)
    references = gradients(net)
    recompute(net, "cheap")
    other = copied(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert all(type(a) is type(b) for a, b in zip(net.modules(), other.modules(), strict=True))
    for gradient, reference in zip(gradients(other), references, strict=True):
        torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_compiled_stages_recompute(backbone):
    torch.manual_seed(0)
    net = BaryIR(**TINY, backbone=backbone)
    references = gradients(net)
    recompute(net, "cheap")
    compile_stages(net, backend="aot_eager")                    # without the minutes of the default's C++
    for gradient, reference in zip(gradients(net), references, strict=True):
        torch.testing.assert_close(gradient, reference)


def test_a_network_without_restormer_blocks_is_refused():
    with pytest.raises(InputError, match="recompute: cheap, but the backbone has no Restormer blocks"):
        recompute(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3)), "cheap")
