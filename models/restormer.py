"""Blocks of Restormer (Zamir et al., arXiv 2111.09881): layer norm, MDTA, GDFN, transformer block, down, up.

Written from the paper's description. All convolutions are bias-free; tensors are [B,C,H,W], fastest in channels-last layout.

Every block also runs strip by strip (`strips`), without gradients, in place and exact: attention needs only sums over all pixels
(statistics), so that a first pass over the strips adds them up and a second one applies them; a 3x3 convolution needs one row of the
neighbouring strips. Nothing but the maps between the blocks is ever whole, so that memory is bounded, and the strips stay in the cache.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel of [B,C,H,W], with scale and shift (biased variance, eps 1e-5)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def depthwise(x: Tensor, weight: Tensor, padding: tuple[int, int] = (1, 1)) -> Tensor:
    """3x3 convolution of each channel with its own filter. x: [B,C,H,W]. weight: [C,1,3,3]."""
    return F.conv2d(x, weight, padding=padding, groups=len(weight))


def depthwise_in_strips(x: Tensor, pointwise: Callable[[Tensor], Tensor], weight: Tensor, rows: int) -> Iterator[tuple[slice, Tensor]]:
    """depthwise(pointwise(x)) in strips of about `rows` rows, none of which is computed twice: yields rows and values.

    Each strip lags one row behind the rows of x that were read, which x may therefore be overwritten with.
    """
    height = x.shape[2]
    seen = None
    for top in range(0, height, rows):
        strip = pointwise(x[:, :, top:top + rows]).permute(0, 2, 3, 1)               # [B,rows,W,C]
        edge = strip.new_zeros(strip[:, :1].shape)
        first, last = top == 0, top + rows >= height
        seen = torch.cat([edge if first else seen, strip, *([edge] if last else [])], dim=1)
        start = 0 if first else top - 1
        if seen.shape[1] > 2:                                   # not after a first strip of a single row
            yield slice(start, start + seen.shape[1] - 2), depthwise(seen.permute(0, 3, 1, 2), weight, (0, 1))
        seen = seen[:, -2:]


class MDTA(nn.Module):
    """Multi-Dconv head transposed attention: attention between channels instead of pixels (Restormer, eq. 1).

    Queries, keys and values share one weight, but are convolved each by itself: nothing strides over the others' channels, and no
    gradients are joined. GDFN treats its two halves the same way.

    Args:
        channels: input and output channels, a multiple of `heads`.
        heads: each head attends within its own channels/heads channels.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels cannot be split into {heads} heads")
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.qkv_depthwise = nn.Conv2d(3 * channels, 3 * channels, 3, padding=1, groups=3 * channels, bias=False)
        self.project_out = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (depthwise(F.conv2d(x, pointwise), weight)
                   for pointwise, weight in zip(self.qkv.weight.chunk(3), self.qkv_depthwise.weight.chunk(3)))
        return self.mix(self.mixing(*self.statistics(q, k)), v)

    def statistics(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over the pixels, float32, of q k^T [B,heads,C/heads,C/heads], q^2 and k^2 [B,heads,C/heads]. q, k: [B,C,H,W]."""
        q, k = (t.permute(0, 2, 3, 1).flatten(1, 2) for t in (q, k))                 # [B,HW,C], views of channels-last tensors
        # Head by head, as the batched product would copy q and k first.
        products = [a.mT @ b for a, b in zip(q.chunk(self.heads, dim=2), k.chunk(self.heads, dim=2))]
        squares = (t.float().square().sum(dim=1).unflatten(1, (self.heads, -1)) for t in (q, k))
        return torch.stack(products, dim=1).float(), *squares

    def mixing(self, qk: Tensor, qq: Tensor, kk: Tensor) -> Tensor:
        """Attention and output projection as one matrix for each sample, [B,C,C] float32, from `statistics`."""
        # <q/|q|, k/|k|> = <q,k> / (|q| |k|): dividing the small product spares two normalised copies of the features.
        q_norm, k_norm = (square.clamp_min(1e-24).sqrt() for square in (qq, kk))     # [B,heads,C/heads]
        similarity = qk / q_norm[..., :, None] / k_norm[..., None, :]
        attention = (similarity * self.temperature).softmax(dim=-1)                  # [B,heads,C/heads,C/heads]
        projection = self.project_out.weight.flatten(1).unflatten(1, (self.heads, -1)).transpose(0, 1)    # [heads,C,C/heads]
        return (projection @ attention).transpose(1, 2).flatten(2)

    @staticmethod
    def mix(mixing: Tensor, v: Tensor) -> Tensor:
        """[B,C,C] applied to the channels of each pixel of v [B,C,H,W]."""
        tokens = v.permute(0, 2, 3, 1).flatten(1, 2) @ mixing.to(v.dtype).mT         # [B,HW,C]
        return tokens.unflatten(1, v.shape[2:]).permute(0, 3, 1, 2)

    def add_in_strips(self, x: Tensor, norm: LayerNorm, rows: int) -> None:
        """x += forward(norm(x)): queries and keys in a first pass over the strips, values in a second one."""
        pointwise_qk, pointwise_v = self.qkv.weight.tensor_split([2 * x.shape[1]])
        depthwise_qk, depthwise_v = self.qkv_depthwise.weight.tensor_split([2 * x.shape[1]])
        sums = None
        for _, qk in depthwise_in_strips(x, lambda strip: F.conv2d(norm(strip), pointwise_qk), depthwise_qk, rows):
            of_strip = self.statistics(*qk.chunk(2, dim=1))
            sums = of_strip if sums is None else [total + part for total, part in zip(sums, of_strip)]
        mixing = self.mixing(*sums)
        for where, v in depthwise_in_strips(x, lambda strip: F.conv2d(norm(strip), pointwise_v), depthwise_v, rows):
            x[:, :, where] += self.mix(mixing, v)


class Gate(torch.autograd.Function):
    """gelu(gate) * value, [B,C,H,W] each, which keeps its inputs alone."""

    @staticmethod
    def forward(ctx, gate: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gate, value)
        return F.gelu(gate).mul_(value)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, value = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(gradient * value, gate), F.gelu(gate).mul_(gradient)


class GDFN(nn.Module):
    """Gated-Dconv feed-forward network (Restormer, eq. 2): gelu(one half) * other half, `expansion` times as wide."""

    def __init__(self, channels: int, expansion: float = 2.66) -> None:
        super().__init__()
        hidden = int(expansion * channels)
        self.project_in = nn.Conv2d(channels, 2 * hidden, 1, bias=False)
        self.depthwise = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=False)
        self.project_out = nn.Conv2d(hidden, channels, 1, bias=False)

    def weights(self) -> tuple[Sequence[Tensor], Sequence[Tensor], Tensor]:
        """Weights of the two halves, pointwise [h,C,1,1] and depthwise [h,1,3,3], and of the output [C,h,1,1].

        Zero channels fill the hidden width up to a multiple h of 16, as kernels work on that many channels at a time and are slow at
        int(2.66 * 96) = 255. The result is the same: gelu(0) * 0 = 0.
        """
        pointwise, weight, out = self.project_in.weight.chunk(2), self.depthwise.weight.chunk(2), self.project_out.weight
        if torch.compiler.is_compiling() and not out.is_cuda:
            return pointwise, weight, out                       # from filled 1x1 weights, the compiler takes a batch of one for NCHW
        extra = -out.shape[1] % 16
        pointwise, weight = ([F.pad(half, (0, 0, 0, 0, 0, 0, 0, extra)) for half in halves] for halves in (pointwise, weight))
        return pointwise, weight, F.pad(out, (0, 0, 0, 0, 0, extra))

    def forward(self, x: Tensor) -> Tensor:
        *halves, out = self.weights()
        gate, value = (depthwise(F.conv2d(x, pointwise), weight) for pointwise, weight in zip(*halves))
        return F.conv2d(Gate.apply(gate, value), out)

    def add_in_strips(self, x: Tensor, norm: LayerNorm, rows: int) -> None:
        """x += forward(norm(x))."""
        pointwise, weight, out = self.weights()
        pointwise, weight = torch.cat(pointwise), torch.cat(weight)
        for where, hidden in depthwise_in_strips(x, lambda strip: F.conv2d(norm(strip), pointwise), weight, rows):
            x[:, :, where] += F.conv2d(Gate.apply(*hidden.chunk(2, dim=1)), out)


class TransformerBlock(nn.Module):
    """x + MDTA(norm(x)), then x + GDFN(norm(x)).

    The sums are float32, under autocast, too: rounded to bfloat16, they turn the gradients of the finest level's norms aside
    (benchmarks/RESULTS.md, "bfloat16 against float32").
    """

    def __init__(self, channels: int, heads: int, expansion: float = 2.66) -> None:
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.attention = MDTA(channels, heads)
        self.norm2 = LayerNorm(channels)
        self.feed_forward = GDFN(channels, expansion)

    def forward(self, x: Tensor) -> Tensor:
        x = at_least_float32(x)
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 where it has less precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Down(nn.Sequential):
    """[B,c,H,W] -> [B,2c,H/2,W/2]: 3x3 convolution to c/2 channels, pixel-unshuffle."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.Conv2d(channels, channels // 2, 3, padding=1, bias=False), nn.PixelUnshuffle(2))


class Up(nn.Sequential):
    """[B,c,H,W] -> [B,c/2,2H,2W]: 3x3 convolution to 2c channels, pixel-shuffle."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False), nn.PixelShuffle(2))


def strips(module: nn.Module, x: Tensor, rows: int) -> Tensor:
    """module(x) of a block, a convolution or a chain of them, in strips of about `rows` rows, without gradients.

    x: [B,C,H,W], overwritten by a block.
    """
    if isinstance(module, TransformerBlock):
        x = at_least_float32(x)
        module.attention.add_in_strips(x, module.norm1, rows)
        module.feed_forward.add_in_strips(x, module.norm2, rows)
        return x
    if isinstance(module, nn.Sequential) and not isinstance(module, Up):
        for part in module:
            x = strips(part, x, rows)
        return x
    if isinstance(module, (nn.Identity, nn.PixelUnshuffle)):
        return module(x)
    height, out = x.shape[2], None
    for top in range(0, height, rows):
        first, last = max(0, top - 1), min(height, top + rows + 1)                  # a 3x3 convolution's neighbouring rows
        strip = module(x[:, :, first:last])
        scale = strip.shape[2] // (last - first)
        if out is None:
            size = (*strip.shape[:2], scale * height, strip.shape[3])
            out = torch.empty(size, dtype=strip.dtype, device=strip.device, memory_format=torch.channels_last)
        bottom = min(height, top + rows)
        out[:, :, scale * top:scale * bottom] = strip[:, :, scale * (top - first):scale * (bottom - first)]
    return out
