"""The barycenter objective of BaryIR (arXiv 2505.21637): transport cost and the two sides of the dual.

    max over congruent f_1..f_K, min over T of  L(f, T) = sum_k lambda_k E_k[ C_i - f_k(b_i) ],  b_i = T(z_i)

One T serves all sources. With gamma > 0 the paper's C_i depends on the batch, too, not on z_i and b_i alone.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.residual import contrastive, orthogonality


def source_weights(samples_per_epoch: Sequence[int], lambdas: str | Sequence[float] = "inverse") -> Tensor:
    """lambda_k, [K] with sum 1: "inverse" (as 1/N_k, the release), "uniform" or a list of K weights."""
    counts = torch.tensor(samples_per_epoch, dtype=torch.float64)
    if lambdas == "inverse":
        weights = 1 / counts
    elif lambdas == "uniform":
        weights = torch.ones_like(counts)
    else:
        weights = torch.tensor(lambdas, dtype=torch.float64)
        if weights.shape != counts.shape or not bool((weights > 0).all()):
            raise ValueError(f"{list(lambdas)}, expected inverse, uniform or {len(counts)} positive numbers")
    return (weights / weights.sum()).float()


def sample_weights(source: Tensor, lambdas: Tensor, probabilities: Tensor) -> Tensor:
    """w_i = lambda_{k_i} / (B p_{k_i}), so that sum_i w_i g_i estimates sum_k lambda_k E_k[g] without bias.

    source: [B] int, -1 for a clean input, which is of no source and weighs nothing. lambdas: [K].
    probabilities: [K], p_k with which a sample is a degraded one of source k.

    Multiplying by lambda alone, as the release does, lets the sampler's proportions into the weights: they
    then differ from those of the congruence and the dual is unbounded.
    """
    return torch.where(source < 0, 0.0, (lambdas / probabilities)[source] / len(source))


def root_mean_square(z: Tensor, b: Tensor) -> Tensor:
    """The paper's dist(z_i, b_i): root mean square over channels and pixels. [B,...] each -> [B]."""
    difference = (z - b).flatten(1)
    return torch.linalg.vector_norm(difference, dim=1) / difference.shape[1] ** 0.5


def mean_square(z: Tensor, b: Tensor) -> Tensor:
    """(z_i - b_i)^2, mean over channels and pixels: the square of root_mean_square. [B,...] each -> [B]."""
    return (z - b).flatten(1).square().mean(dim=1)


COSTS = {"root_mean_square": root_mean_square, "mean_square": mean_square}


def transport_cost(z: Tensor, b: Tensor, source: Tensor, cost: str = "mean_square", gamma: float = 0.05,
                   tau: float = 0.07) -> dict[str, Tensor]:
    """C_i = dist(z_i, b_i) + gamma (L_ctr,i + L_ort,i), [B], with its terms. cost: the name of dist in COSTS.

    z, b: [B,...]. source: [B] int. With gamma = 0 the two latent terms are left out.
    """
    distance = COSTS[cost](z, b)
    if not gamma:
        return {"cost": distance, "distance": distance}
    ctr, ort = contrastive(z - b, source, tau), orthogonality(b, z - b, source)
    total = distance + gamma * (ctr + ort)
    return {"cost": total, "distance": distance, "contrastive": ctr, "orthogonality": ort}


def of_source(f: Tensor, source: Tensor) -> Tensor:
    """f_{k_i}(b_i) of all potentials' values: [B,K] and [B] int -> [B]; of clean inputs (-1), any of them."""
    return f.gather(1, source.clamp(min=0)[:, None]).squeeze(1)


def dual_objective(cost: Tensor, f: Tensor, source: Tensor, weights: Tensor) -> Tensor:
    """sum_k lambda_k E_k[ C_i - f_k(b_i) ], the batch's estimate of L(f, T), for T to descend.

    cost: C_i, [B]. f: all potentials at b, [B,K]. source: [B] int. weights: [B], of sample_weights.
    """
    return (weights * (cost - of_source(f, source))).sum()


def dual_terms(dual: Tensor, costs: dict[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
    """For the log, detached: the value of dual_objective and its terms. costs: of transport_cost."""
    terms = {name: (weights * value).sum().detach() for name, value in costs.items()}
    return {"dual": dual.detach(), "potential": terms["cost"] - dual.detach(), **terms}


def reconstruction_loss(restored: Tensor, clean: Tensor,
                        low_weight: Tensor | float | None = None) -> tuple[Tensor, Tensor]:
    """mean|x^ - x|, the paper's; with a low_weight in two bands, mean|e - e_8| + low_weight mean|e_8|.

    restored, clean: [B,3,H,W]. e = x^ - x; e_8: its means over 8x8 pixels. Ours, not the paper's: an error of
    brightness (low light, haze) pushes all pixels one way, and its gradient drowns that of noise and detail.
    Returns the loss and, detached, mean|x^ - x|.
    """
    error = restored - clean
    mean = error.abs().mean()
    if low_weight is None:
        return mean, mean.detach()
    low = F.avg_pool2d(error, 8, ceil_mode=True, count_include_pad=False)
    blocks = low.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    high = error - blocks[..., :error.shape[2], :error.shape[3]]
    return high.abs().mean() + low_weight * low.abs().mean(), mean.detach()


def congruence_error(f: Tensor, lambdas: Tensor) -> Tensor:
    """Root mean square over the batch of sum_k lambda_k f_k, which should be zero. f: [B,K], lambdas: [K]."""
    return (f @ lambdas).square().mean().sqrt()


def potential_objective(f: Tensor, source: Tensor, weights: Tensor, lambdas: Tensor,
                        rho: float = 0.0) -> Tensor:
    """sum_k lambda_k E_k[ f_k(b_i) ] + rho * batch mean of (sum_k lambda_k f_k)^2, for potentials to descend.

    rho: 0 for congruent potentials, 10 in the release, whose congruence is soft.
    f: all potentials at b, [B,K]. source: [B] int. weights: [B], of sample_weights. lambdas: [K].
    """
    loss = (weights * of_source(f, source)).sum()
    return loss + rho * (f @ lambdas).square().mean() if rho else loss
