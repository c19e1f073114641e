"""Blocks of Restormer (Zamir et al., arXiv 2111.09881): layer norm, MDTA, GDFN, transformer block, down, up.

Written from the paper's description. All convolutions are bias-free. Maps are [B,C,H,W], fastest in
channels-last layout. The functions below the blocks are their operations in the form that is fast and keeps
little for the backward pass (each was measured: benchmarks/RESULTS.md).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel of [B,C,H,W] (biased variance, eps 1e-5)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MDTA(nn.Module):
    """Multi-Dconv head transposed attention: attention between channels instead of pixels (Restormer, eq. 1).

    q, k, v = qkv_depthwise(qkv(x)); project_out(softmax(<q/|q|, k/|k|> * temperature) v), where each head
    attends within its own c = channels / heads channels.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels cannot be split into {heads} heads")
        wide = 3 * channels
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Conv2d(channels, wide, 1, bias=False)
        self.qkv_depthwise = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.project_out = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = convolve(x, self.qkv.weight, self.qkv_depthwise.weight, parts=3)             # 3 x [B,C,H,W]
        attention = self.attention_matrix(*self.products(q, k))                                # [B,heads,c,c]
        return mix_channels(self.projected(attention), v)                                      # [B,C,H,W]

    def products(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over the pixels: q k^T [B,heads,c,c], and in float32 |q|^2 and |k|^2 [B,heads,c]."""
        q, k = tokens(q), tokens(k)                                                            # [B,HW,C]
        qq, kk = (t.float().square().sum(dim=1).unflatten(1, (self.heads, -1)) for t in (q, k))
        return products_of_heads(q, k, self.heads), qq, kk

    def attention_matrix(self, qk: Tensor, qq: Tensor, kk: Tensor) -> Tensor:
        """softmax(<q/|q|, k/|k|> * temperature) [B,heads,c,c], from `products`."""
        # <q/|q|, k/|k|> = <q,k> / (|q| |k|): dividing the small matrix spares normalised copies of q and k.
        q_norm, k_norm = (square.clamp_min(1e-24).sqrt() for square in (qq, kk))
        similarity = qk / q_norm[..., :, None] / k_norm[..., None, :]
        return (similarity * self.temperature).softmax(dim=-1)

    def projected(self, attention: Tensor) -> Tensor:
        """Attention A and output projection W as one matrix (W A)^T [B,C,C], as W (A v) = (W A) v."""
        w = self.project_out.weight.flatten(1).mT.unflatten(0, (self.heads, -1))               # [heads,c,C]
        return (attention.mT @ w).flatten(1, 2)


class GDFN(nn.Module):
    """Gated-Dconv feed-forward network (Restormer, eq. 2) of h = `expansion` * channels hidden channels.

    x1, x2 = depthwise(project_in(x)); project_out(gelu(x1) * x2).
    """

    def __init__(self, channels: int, expansion: float = 2.66) -> None:
        super().__init__()
        hidden = int(expansion * channels)
        self.project_in = nn.Conv2d(channels, 2 * hidden, 1, bias=False)
        self.depthwise = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=False)
        self.project_out = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        project_in, depthwise, project_out = self.weights()
        x1, x2 = convolve(x, project_in, depthwise, parts=2)                                   # 2 x [B,h,H,W]
        return F.conv2d(gelu_times(x1, x2), project_out)                                       # [B,C,H,W]

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights of project_in, depthwise and project_out, h filled up with zeros to a multiple of 16.

        Kernels work on that many channels at a time and are slow at int(2.66 * 96) = 255. The result is the
        same, as gelu(0) * 0 = 0.
        """
        project_in, depthwise, out = self.project_in.weight, self.depthwise.weight, self.project_out.weight
        missing = -out.shape[1] % 16
        if not missing:
            return project_in, depthwise, out
        halves = (torch.cat([F.pad(half, (0,) * 7 + (missing,)) for half in weight.chunk(2)])
                  for weight in (project_in, depthwise))
        return *halves, F.pad(out, (0,) * 5 + (missing,))


class TransformerBlock(nn.Module):
    """x + MDTA(norm(x)), then x + GDFN(norm(x))."""

    def __init__(self, channels: int, heads: int, expansion: float = 2.66) -> None:
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.attention = MDTA(channels, heads)
        self.norm2 = LayerNorm(channels)
        self.feed_forward = GDFN(channels, expansion)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class Down(nn.Sequential):
    """[B,c,H,W] -> [B,2c,H/2,W/2]: 3x3 convolution to c/2 channels, pixel-unshuffle."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.Conv2d(channels, channels // 2, 3, padding=1, bias=False), nn.PixelUnshuffle(2))


class Up(nn.Sequential):
    """[B,c,H,W] -> [B,c/2,2H,2W]: 3x3 convolution to 2c channels, pixel-shuffle."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False), nn.PixelShuffle(2))


def convolve(x: Tensor, pointwise: Tensor, depthwise: Tensor, parts: int) -> list[Tensor]:
    """1x1, then depthwise 3x3 convolution of x [B,C,H,W] by [c,C,1,1], [c,1,3,3]: parts [B,c/parts,H,W]."""
    if x.is_cuda:                                               # where each kernel's launch takes its time
        x = F.conv2d(x, pointwise)
        return F.conv2d(x, depthwise, padding=1, groups=len(depthwise)).chunk(parts, dim=1)
    # Each by itself: nothing strides over the others' channels, and no gradients are joined.
    pairs = zip(pointwise.chunk(parts), depthwise.chunk(parts), strict=True)
    return [F.conv2d(F.conv2d(x, p), d, padding=1, groups=len(d)) for p, d in pairs]


def tokens(x: Tensor) -> Tensor:
    """[B,C,H,W] -> [B,HW,C], a view in channels-last layout."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def mix_channels(matrix: Tensor, v: Tensor) -> Tensor:
    """The channels of each pixel of v [B,C,H,W] times a matrix [B,C,C]."""
    return (tokens(v) @ matrix.to(v.dtype)).unflatten(1, v.shape[2:]).permute(0, 3, 1, 2)


def products_of_heads(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """q^T k of each head's c = C/heads channels, q and k [B,HW,C]: [B,heads,c,c]."""
    if q.dtype == torch.float32 and not q.is_cuda:              # head by head: the least operations
        pairs = zip(q.chunk(heads, dim=2), k.chunk(heads, dim=2), strict=True)
        return torch.stack([q_head.mT @ k_head for q_head, k_head in pairs], dim=1)
    # Of all heads with all: one kernel, where bfloat16 would copy each head's channels first.
    qk = (q.mT @ k).unflatten(2, (heads, -1)).unflatten(1, (heads, -1))
    return qk.diagonal(dim1=1, dim2=3).movedim(3, 1)


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
