"""Operations of Restormer's blocks in the form that is fast and keeps little for the backward pass.

None of them changes a result; each was measured (benchmarks/RESULTS.md).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def depthwise_conv(x: Tensor, weight: Tensor, padding: tuple[int, int] = (1, 1)) -> Tensor:
    """3x3 convolution of each channel with its own filter. x: [B,C,H,W]. weight: [C,1,3,3]."""
    return F.conv2d(x, weight, padding=padding, groups=len(weight))


def convolve(x: Tensor, pointwise: Sequence[Tensor], depthwise: Sequence[Tensor]) -> list[Tensor]:
    """1x1, then depthwise 3x3 convolution of x [B,C,H,W]: [B,c,H,W] per pair of weights [c,C,1,1], [c,1,3,3].

    Each by itself: nothing strides over the others' channels, and no gradients are joined.
    """
    return [depthwise_conv(F.conv2d(x, p), d) for p, d in zip(pointwise, depthwise, strict=True)]


class GeluTimes(torch.autograd.Function):
    """gelu(x1) * x2, [B,C,H,W] each, which keeps its inputs alone."""

    @staticmethod
    def forward(ctx, x1: Tensor, x2: Tensor) -> Tensor:
        ctx.save_for_backward(x1, x2)
        return F.gelu(x1).mul_(x2)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x1, x2 = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(gradient * x2, x1), F.gelu(x1).mul_(gradient)


gelu_times = GeluTimes.apply
Halves = Sequence[Tensor]


def filled_up(pointwise: Tensor, depthwise: Tensor, out: Tensor) -> tuple[Halves, Halves, Tensor]:
    """Weights of a gated feed-forward [2h,C,1,1], [2h,1,3,3], [C,h,1,1], the first two in halves.

    Zero channels fill the hidden width h up to a multiple of 16: kernels work on that many channels at a time
    and are slow at int(2.66 * 96) = 255. The result is the same, as gelu(0) * 0 = 0.
    """
    halves = pointwise.chunk(2), depthwise.chunk(2)
    if torch.compiler.is_compiling() and not out.is_cuda:
        return *halves, out     # from filled 1x1 weights, the compiler takes a batch of one for NCHW
    extra = -out.shape[1] % 16
    halves = ([F.pad(half, (0, 0, 0, 0, 0, 0, 0, extra)) for half in weights] for weights in halves)
    return *halves, F.pad(out, (0, 0, 0, 0, 0, extra))
