"""BaryIR with parts changed, to ask what they are worth, and the rows of the study (benchmarks/study.py).

Weights keep their names and shapes.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.baryir import BaryIR


class OneLatent(BaryIR):
    """The decoder gets zeros in the place of one of the latents. kept: both, barycenter or residual."""

    def __init__(self, kept: str = "both", **network) -> None:
        super().__init__(**network)
        self.kept = kept

    def decode(self, b: Tensor, r: Tensor, skips: list[Tensor], free_skips: bool = False) -> Tensor:
        b, r = b * (self.kept != "residual"), r * (self.kept != "barycenter")
        return super().decode(b, r, skips, free_skips)


class Bottleneck(BaryIR):
    """A network in which the split matters: content reaches the decoder through b alone.

    The decoder gets neither skips nor the degraded image to add to; of r it gets the mean over the pixels.

    Args:
        transport_map: moving; frozen, at its weights, which then are buffers; settled, with the encoder's,
            so that the decoder alone moves; none, b = z.
        dropout: share of the training samples whose r is zero.
    """

    def __init__(self, transport_map: str = "moving", dropout: float = 0.0, **network) -> None:
        super().__init__(**network)
        self.identity, self.dropout = transport_map == "none", dropout
        if transport_map in ("frozen", "settled"):
            freeze(self.transport_map)
        if transport_map == "settled":
            freeze(nn.ModuleList([self.patch_embed, self.encoder, self.down, self.latent, self.latent_norm]))

    def encode(self, degraded: Tensor) -> tuple[Tensor, list[Tensor]]:
        z, skips = super().encode(degraded)
        return z, [torch.zeros_like(skip) for skip in skips]

    def transport(self, z: Tensor) -> Tensor:
        return z if self.identity else super().transport(z)

    def decode(self, b: Tensor, r: Tensor, skips: list[Tensor], free_skips: bool = False) -> Tensor:
        r = r.mean(dim=(2, 3), keepdim=True)                                    # [B,8C,1,1]
        if self.training and self.dropout:
            r = r * (torch.rand(len(r), 1, 1, 1, device=r.device) >= self.dropout)
        return super().decode(b, r.expand_as(b), skips, free_skips)


def freeze(stage: nn.Module) -> None:
    """Turn a stage's parameters into buffers of the same names, which no side of the training moves."""
    for module in stage.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, weight.detach())


class Design(NamedTuple):
    baselines: tuple[str, ...]                  # rows that others are compared with
    unseen: tuple[str, ...]                     # groups of sets on which it is judged
    paired: bool                                # whether rows of a seed have a warm start in common


class Row(NamedTuple):
    design: str
    file: str
    seeds: int
    network: Callable[..., BaryIR] = BaryIR


DESIGNS = {"decide": Design(("frozen", "w", "frozen_settled"), ("level", "mixed"), True),
           "study": Design(("b", "c"), ("type", "mixed"), False)}
FROZEN, SETTLED = (partial(Bottleneck, transport_map=what) for what in ("frozen", "settled"))
ROWS = {                                                                # in the order of the tables
    "w": Row("decide", "w.yml", 8, FROZEN),
    "transport": Row("decide", "transport.yml", 8, Bottleneck),
    "frozen": Row("decide", "frozen.yml", 8, FROZEN),
    "reconstruction": Row("decide", "reconstruction.yml", 8, Bottleneck),
    "none": Row("decide", "none.yml", 8, partial(Bottleneck, transport_map="none")),
    "oracle": Row("decide", "oracle.yml", 2, FROZEN),
    "dropout": Row("decide", "dropout.yml", 2, partial(Bottleneck, dropout=0.5)),
    "transport_settled": Row("decide", "settled.yml", 4, SETTLED),
    "frozen_settled": Row("decide", "settled.yml", 4, SETTLED),
    "b": Row("study", "b_restormer_large.yml", 3),
    "c": Row("study", "c_no_transport.yml", 3),
    "e": Row("study", "e_separate.yml", 3),
    "k": Row("study", "k_faster_potentials.yml", 3),
    "d": Row("study", "d_paper.yml", 1),
    "g": Row("study", "g_barycenter_alone.yml", 1, partial(OneLatent, kept="barycenter")),
}
BEGUN_WITH = dict.fromkeys(("transport", "frozen", "reconstruction", "none", "dropout"), "w")      # arms
BEGUN_WITH |= {"transport_settled": "transport", "frozen_settled": "frozen"}
