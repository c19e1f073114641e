"""Blocks of Restormer (Zamir et al., arXiv 2111.09881): layer norm, MDTA, GDFN, transformer block, down, up.

Written from the paper's description. All convolutions are bias-free; tensors are [B,C,H,W].
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel of [B,C,H,W], with scale and shift (biased variance, eps 1e-5)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MDTA(nn.Module):
    """Multi-Dconv head transposed attention: attention between channels instead of pixels (Restormer, eq. 1).

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
        q, k, v = self.qkv_depthwise(self.qkv(x)).chunk(3, dim=1)
        q, k, v = (t.flatten(2).unflatten(1, (self.heads, -1)) for t in (q, k, v))    # [B,heads,C/heads,HW]

        # <q/|q|, k/|k|> = <q,k> / (|q| |k|): dividing the small product spares two normalised copies of the features.
        q_norm = torch.linalg.vector_norm(q, dim=-1, keepdim=True).clamp_min(1e-12)   # [B,heads,C/heads,1]
        k_norm = torch.linalg.vector_norm(k, dim=-1, keepdim=True).clamp_min(1e-12)
        similarity = (q @ k.mT) / q_norm / k_norm.mT                                  # [B,heads,C/heads,C/heads]
        attention = (similarity * self.temperature).softmax(dim=-1)

        return self.project_out((attention @ v).reshape(x.shape))                     # [B,C,H,W]


class GDFN(nn.Module):
    """Gated-Dconv feed-forward network (Restormer, eq. 2): gelu(one half) * other half, `expansion` times as wide."""

    def __init__(self, channels: int, expansion: float = 2.66) -> None:
        super().__init__()
        hidden = int(expansion * channels)
        self.project_in = nn.Conv2d(channels, 2 * hidden, 1, bias=False)
        self.depthwise = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=False)
        self.project_out = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.depthwise(self.project_in(x)).chunk(2, dim=1)
        return self.project_out(F.gelu(gate) * value)


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
