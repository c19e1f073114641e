"""The barycenter objective of BaryIR (arXiv 2505.21637): transport cost and the two sides of the dual.

    max over congruent f_1..f_K, min over T of  sum_k lambda_k E_{z ~ P_k} [ C_k(z, T(z)) - f_k(T(z)) ]
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from losses.residual import contrastive, orthogonality


def source_weights(samples_per_epoch: Sequence[int], lambdas: str | Sequence[float] = "inverse") -> Tensor:
    """lambda_k, [K] with sum 1: "inverse" (proportional to 1/N_k, the release), "uniform" or a list of K weights."""
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
    """Weights w_i with which sum_i w_i g_i estimates sum_k lambda_k E_k[g] without bias: lambda_{k_i} / (B p_{k_i}).

    Args:
        source: [B] int. lambdas: [K]. probabilities: [K], p_k with which the sampler draws source k.

    Multiplying by lambda alone, as the release does, lets the sampler's proportions into the weights: they then differ
    from those of the congruence and the dual is unbounded.
    """
    return (lambdas / probabilities)[source] / len(source)


def transport_distance(z: Tensor, b: Tensor) -> Tensor:
    """dist(z_i, b_i): root mean square over channels and pixels. [B,8C,h,w] each -> [B]."""
    difference = (z - b).flatten(1)
    return torch.linalg.vector_norm(difference, dim=1) / difference.shape[1] ** 0.5


def map_objective(
    restored: Tensor, clean: Tensor, z: Tensor, b: Tensor, f: Tensor, source: Tensor, weights: Tensor,
    w_rec: float = 1e4, gamma: float = 0.05, tau: float = 0.07,
) -> tuple[Tensor, dict[str, Tensor]]:
    """w_rec * mean|x^ - x| + sum_k lambda_k E_k[ C_i - f_k(b_i) ],  C_i = dist + gamma (L_ctr + L_ort).

    Args:
        restored, clean: [B,3,H,W]. z, b: [B,8C,h,w]. f: all potentials at b, [B,K]. source: [B] int.
        weights: [B], of sample_weights.

    Returns the scalar to minimise over encoder, T and decoder, and its terms, detached, each weighted over the sources.
    """
    r = z - b
    distance, l_ctr, l_ort = transport_distance(z, b), contrastive(r, source, tau), orthogonality(b, r)    # [B]
    f_k = f.gather(1, source[:, None]).squeeze(1)                                                          # [B]

    reconstruction = (restored - clean).abs().mean()
    cost = distance + gamma * (l_ctr + l_ort)
    loss = w_rec * reconstruction + (weights * (cost - f_k)).sum()

    terms = {"reconstruction": reconstruction}
    for name, value in (("distance", distance), ("contrastive", l_ctr), ("orthogonality", l_ort), ("potential", f_k)):
        terms[name] = (weights * value).sum()
    return loss, {name: value.detach() for name, value in terms.items()}


def congruence_penalty(f: Tensor, lambdas: Tensor, rho: float = 10.0) -> Tensor:
    """rho * mean over the batch of (sum_k lambda_k f_k)^2: the release's soft congruence. f: [B,K], lambdas: [K]."""
    return rho * (f * lambdas).sum(dim=1).square().mean()


def potential_objective(
    f: Tensor, source: Tensor, weights: Tensor, lambdas: Tensor, rho: float = 0.0
) -> Tensor:
    """sum_k lambda_k E_k[ f_k(b_i) ], which the potentials descend subject to congruence; plus the penalty if rho > 0.

    f: all potentials at b, [B,K]. source: [B] int. weights: [B], of sample_weights. lambdas: [K].
    """
    f_k = f.gather(1, source[:, None]).squeeze(1)
    loss = (weights * f_k).sum()
    return loss + congruence_penalty(f, lambdas, rho) if rho else loss
