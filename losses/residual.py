"""The two terms of the transport cost that shape the residual r = z - b (arXiv 2505.21637). r^: normalised.

Both couple the samples of a batch, with gradients into all of them; of several processes, the samples of all.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.distributed import gather


def normalized(latent: Tensor) -> Tensor:
    """[B,...] -> [B,D]: each sample flattened to a vector and divided by its L2 norm."""
    return F.normalize(latent.flatten(1), dim=1)


def contrastive(r: Tensor, source: Tensor, tau: float = 0.07) -> Tensor:
    """L_ctr,i = -log( sum_{j: k_j = k_i} exp(<r^_i, r^_j>/tau) / sum_j exp(<r^_i, r^_j>/tau) ), j = i too.

    r: residual latents [B,8C,h,w]. source: [B] int; -1 for clean inputs, which others do not see. tau: 0.07
    in the release. Returns [B]; zero where all samples share one source. With j = i, as in the release, it is
    nearly zero as soon as residuals are orthogonal: its value alone shows no clusters.
    """
    r = normalized(r)
    mine, theirs = source[:, None], gather(source)[None, :]
    logits = r @ gather(r).T / tau                                              # [B,processes * B]
    logits = logits.masked_fill((theirs < 0) & (mine >= 0), -torch.inf)
    same = logits.masked_fill(mine != theirs, -torch.inf)
    return logits.logsumexp(dim=1) - same.logsumexp(dim=1)


def orthogonality(b: Tensor, r: Tensor, source: Tensor) -> Tensor:
    """L_ort,i = sum_j <b^_i, r^_j>^2 over all samples j: barycenter latents carry nothing of any residual.

    b, r: [B,8C,h,w]. source: [B] int; clean inputs (-1) are no j. Returns [B]. A sum, as in the paper: it
    grows with the batch and the number of processes (the release takes a smaller gamma on several GPUs).
    """
    products = (normalized(b) @ gather(normalized(r)).T).square()
    return (products * (gather(source) >= 0)).sum(dim=1)
