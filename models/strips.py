"""Inference in bounded memory: a network of Restormer blocks a few rows at a time, equal up to rounding.

Attention needs only sums over all pixels: a first pass over the strips adds them up, a second one uses them.
A 3x3 convolution needs one row of the neighbouring strips. Only the maps between the blocks and the values of
one attention are ever whole; PromptIR's prompt is one of them, mixed and resized for the whole image.
On a CPU, strips that stay in the cache are the fastest, too.
"""

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.baryir import BaryIR, Blocks
from models.restormer import TransformerBlock, Up, gelu_times, mix_channels

CPU_STRIP = 16 * 2**20          # bytes of a strip's widest map on a CPU


def in_strips(net: nn.Module, rows: int) -> nn.Module:
    """A twin of the network, with its weights, that computes about `rows` rows at a time, without gradients.

    The network stays as it is, so that other threads may use it. The twin's blocks overwrite the maps that
    they are given, which must not be used again.
    """
    if isinstance(net, Blocks) and any(type(block) is not TransformerBlock for block in net):
        return net                                              # of another backbone: they see the whole map
    if isinstance(net, TransformerBlock):
        return BlockInStrips(net, rows)
    if isinstance(net, Up) or isinstance(net, nn.Conv2d) and sees_one_row_more(net):
        return ConvolutionInStrips(net, rows)
    twin = copy.copy(net)                                       # the same parameters, other modules inside
    twin._modules = {name: in_strips(child, rows) for name, child in net._modules.items()}
    return twin


def sees_one_row_more(net: nn.Conv2d) -> bool:
    """Whether a convolution is a 1x1 or 3x3 one that keeps the size. Others stay whole in strips."""
    simple = net.stride == net.dilation == (1, 1) and net.padding_mode == "zeros"
    return simple and (net.kernel_size, net.padding) in (((1, 1), (0, 0)), ((3, 3), (1, 1)))


class BlockInStrips(nn.Module):
    """A transformer block, in place."""

    def __init__(self, block: TransformerBlock, rows: int) -> None:
        super().__init__()
        self.block, self.rows = block, rows

    def forward(self, x: Tensor) -> Tensor:
        for sample in x.split(1):
            self.add_attention(sample)
            self.add_feed_forward(sample)
        return x

    def add_attention(self, x: Tensor) -> None:
        """x += attention(norm1(x)), x [1,C,H,W]: values are kept until all strips' q and k are summed."""
        mdta, sums, values = self.block.attention, (0, 0, 0), []
        weights = mdta.qkv.weight, mdta.qkv_depthwise.weight
        for where, (q, k, v) in convolve_in_strips(x, self.block.norm1, *weights, parts=3, rows=self.rows):
            sums = [a + b.float() for a, b in zip(sums, mdta.products(q, k), strict=True)]
            values.append((where, v))
        matrix = mdta.projected(mdta.attention_matrix(*sums))
        for where, v in values:
            x[:, :, where] += mix_channels(matrix, v)

    def add_feed_forward(self, x: Tensor) -> None:
        """x += feed_forward(norm2(x)), x [1,C,H,W]."""
        *weights, out = self.block.feed_forward.weights()
        for where, (x1, x2) in convolve_in_strips(x, self.block.norm2, *weights, parts=2, rows=self.rows):
            x[:, :, where] += F.conv2d(gelu_times(x1, x2), out)


def convolve_in_strips(x: Tensor, norm: nn.Module, pointwise: Tensor, depthwise: Tensor, parts: int,
                       rows: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """`convolve` of norm(x), no row of which is computed twice: yields rows and their parts.

    Each strip lags one row behind the rows of x that were read, so that x may be overwritten there.
    """
    (height, width), device = x.shape[2:], x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    pointwise, depthwise = (weight.to(dtype).chunk(parts) for weight in (pointwise, depthwise))
    # Maps of a strip's rows behind the last two of the strip before it; beyond the image's edges are zeros.
    seen = [x.new_empty(1, min(rows, height) + 3, width, len(p), dtype=dtype) for p in pointwise]
    for top in range(0, height, rows):
        strip = norm(x[:, :, top:top + rows]).permute(0, 2, 3, 1).to(dtype)                     # [1,rows,W,C]
        new, first, last = strip.shape[1], top == 0, top + rows >= height
        for part, p in zip(seen, pointwise, strict=True):
            torch.mm(strip.flatten(0, 2), p.flatten(1).mT, out=part[0, 2:2 + new].flatten(0, 1))
            if first:
                part[:, 1] = 0
            if last:
                part[:, 2 + new] = 0
        begin, end = int(first), 2 + new + int(last)
        if end - begin > 2:                                     # not after a first strip of a single row
            values = [F.conv2d(part[:, begin:end].permute(0, 3, 1, 2), d, padding=(0, 1), groups=len(d))
                      for part, d in zip(seen, depthwise, strict=True)]
            start = max(top - 1, 0)
            yield slice(start, start + end - begin - 2), values
        for part in seen:
            part[:, :2] = part[:, new:new + 2].clone()


class ConvolutionInStrips(nn.Module):
    """A 1x1 or 3x3 convolution, or one with its pixel-shuffle (Up)."""

    def __init__(self, convolution: nn.Module, rows: int) -> None:
        super().__init__()
        self.convolution, self.rows = convolution, rows

    def forward(self, x: Tensor) -> Tensor:
        height, out = x.shape[2], None
        for top in range(0, height, self.rows):
            bottom = min(height, top + self.rows)
            first, last = max(0, top - 1), min(height, bottom + 1)          # with the neighbouring rows
            strip = self.convolution(x[:, :, first:last])
            scale = strip.shape[2] // (last - first)                        # 2 with a pixel-shuffle, else 1
            if out is None:
                size, layout = (*strip.shape[:2], scale * height, strip.shape[3]), torch.channels_last
                out = torch.empty(size, dtype=strip.dtype, device=strip.device, memory_format=layout)
            inner = strip[:, :, scale * (top - first):scale * (bottom - first)]
            out[:, :, scale * top:scale * bottom] = inner
        return out


def strip_rows(net: BaryIR, height: int, width: int, element: int, device: torch.device) -> int:
    """Rows to compute at a time of an image of height x width pixels, 0 for all.

    On a CPU as many as keep a strip's widest map in the cache; on CUDA all where the free memory holds them.
    element: bytes of a number.
    """
    row = net.widest * width * element                          # of the widest map; a strip holds about two
    if device.type == "cpu":
        rows = max(CPU_STRIP // row, 2)
    else:
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = 0.9 * (torch.cuda.mem_get_info(device)[0] + unused)
        maps = 8 * net.width * width * element * height         # skips, both branches and their concatenation
        if 3 * row * height + maps < free:
            return 0
        rows = max(int((free - maps) / (3 * row)), 16)
    return rows if rows < height else 0
