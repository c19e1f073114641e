"""Operations of Restormer's blocks in the form that is fast and keeps little for the backward pass.

None of them changes a result but by rounding; each was measured (benchmarks/RESULTS.md).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def working_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which convolutions and products of x are computed: autocast's if enabled, else its own."""
    device = x.device.type
    rounded = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)     # not on meta
    return torch.get_autocast_dtype(device) if rounded else x.dtype


def depthwise_conv(x: Tensor, weight: Tensor, padding: tuple[int, int] = (1, 1)) -> Tensor:
    """3x3 convolution of each channel with its own filter. x: [B,C,H,W]. weight: [C,1,3,3]."""
    return F.conv2d(x, weight, padding=padding, groups=len(weight))


def convolve(x: Tensor, pointwise: Tensor, depthwise: Tensor, parts: int) -> list[Tensor]:
    """1x1, then depthwise 3x3 convolution of x [B,C,H,W] by [c,C,1,1], [c,1,3,3]: parts [B,c/parts,H,W]."""
    if x.is_cuda:                                               # where each kernel's launch takes its time
        return depthwise_conv(F.conv2d(x, pointwise), depthwise).chunk(parts, dim=1)
    # Each by itself: nothing strides over the others' channels, and no gradients are joined.
    pairs = zip(pointwise.chunk(parts), depthwise.chunk(parts), strict=True)
    return [depthwise_conv(F.conv2d(x, p), d) for p, d in pairs]


def gelu(x: Tensor) -> Tensor:
    """GELU of [B,C,H,W] in channels-last layout: PyTorch has a faster kernel where it sees [B,H,W,C]."""
    return F.gelu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GeluTimes(torch.autograd.Function):
    """gelu(x1) * x2, [B,C,H,W] each, which keeps its inputs alone."""

    @staticmethod
    def forward(ctx, x1: Tensor, x2: Tensor) -> Tensor:
        ctx.save_for_backward(x1, x2)
        return gelu(x1).mul_(x2)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x1, x2 = ctx.saved_tensors
        of_gelu, at = (t.permute(0, 2, 3, 1) for t in (gradient * x2, x1))
        return torch.ops.aten.gelu_backward(of_gelu, at).permute(0, 3, 1, 2), gelu(x1).mul_(gradient)


gelu_times = GeluTimes.apply


def products_of_heads(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """q^T k of each head's c = C/heads channels, q and k [B,HW,C]: [B,heads,c,c]."""
    if q.dtype == torch.float32 and not q.is_cuda:              # head by head: the least operations
        pairs = zip(q.chunk(heads, dim=2), k.chunk(heads, dim=2), strict=True)
        return torch.stack([q_head.mT @ k_head for q_head, k_head in pairs], dim=1)
    # Of all heads with all: one kernel, where bfloat16 would copy each head's channels first.
    qk = (q.mT @ k).unflatten(2, (heads, -1)).unflatten(1, (heads, -1))
    return qk.diagonal(dim1=1, dim2=3).movedim(3, 1)


def filled_up(pointwise: Tensor, depthwise: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of a gated feed-forward [2h,C,1,1], [2h,1,3,3], [C,h,1,1].

    Zero channels fill each hidden half's width h up to a multiple of 16: kernels work on that many channels
    at a time and are slow at int(2.66 * 96) = 255. The result is the same, as gelu(0) * 0 = 0.
    """
    if torch.compiler.is_compiling() and not out.is_cuda:
        return pointwise, depthwise, out    # with filled ones, the compiler chooses NCHW for a batch of 1
    width = out.shape[1]
    filled = width + -width % 16

    def fill(weight: Tensor, dim: int) -> Tensor:
        shape = (*weight.shape[:dim], filled, *weight.shape[dim + 1:])
        wide = weight.new_zeros(shape, dtype=working_dtype(weight))
        wide.narrow(dim, 0, width).copy_(weight)
        return wide

    halves = (fill(weight.unflatten(0, (2, width)), dim=1).flatten(0, 1) for weight in (pointwise, depthwise))
    return *halves, fill(out, dim=1)
