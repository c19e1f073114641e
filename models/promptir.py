"""Prompt blocks of PromptIR (Potlapalli et al., arXiv 2306.13090), written from the paper's description.

Its backbone is Restormer plus, on the latent and between the decoder's levels, a prompt that tells of the
degradation; models/baryir.py has the block and the 1x1 convolution in which a map meets its prompt.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TRAINING_PATCH = 128            # pixels; the paper's prompts have the sizes of its maps


class Prompt(nn.Module):
    """Prompt generation (PromptIR, section 3): appends a mixture of learned prompts P_n to a map F.

    weights = softmax(linear(mean of F over its pixels)); prompt = conv3x3(resize(sum_n weights_n P_n)).

    Args:
        channels: of F, the map's first ones, which choose the mixture; in the latent those of b, not of r.
        prompt_channels: P, which are appended.
        size: S, side of the learned prompts.
        count: N_p, the learned prompts.
    """

    def __init__(self, channels: int, prompt_channels: int, size: int, count: int = 5) -> None:
        super().__init__()
        self.channels, self.prompt_channels = channels, prompt_channels
        self.prompts = nn.Parameter(torch.rand(count, prompt_channels, size, size))
        self.linear = nn.Linear(channels, count)
        self.conv = nn.Conv2d(prompt_channels, prompt_channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.linear(x[:, :self.channels].mean(dim=(2, 3))).softmax(dim=1)         # [B,N]
        prompt = (weights @ self.prompts.flatten(1)).unflatten(1, self.prompts.shape[1:])   # [B,P,S,S]
        prompt = self.conv(F.interpolate(prompt, x.shape[2:], mode="bilinear"))             # [B,P,H,W]
        return torch.cat([x, prompt], dim=1)                                                # [B,C+P,H,W]


def make_prompts(width: int, levels: int, heads: int) -> list[Prompt]:
    """Prompts for the maps of 2C, 4C, ... and for the latent: P = 64, 128, 320, S = 64, 32, 16 at C = 48.

    That is P = 2/3 of the map's channels, 5/6 of the latent's, here to the nearest multiple of the heads of
    the block behind it; S is the map's side while training.
    """
    shares = [2 / 3] * (levels - 1) + [5 / 6]
    channels = [width * 2**level for level in range(1, levels + 1)]
    sides = [TRAINING_PATCH // 2**level for level in range(1, levels + 1)]
    return [Prompt(c, heads * round(share * c / heads), side)
            for c, share, side in zip(channels, shares, sides, strict=True)]
