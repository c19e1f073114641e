"""How far maps T and potentials f are from the optimum: duality gaps of Wasserstein-2 barycenters, a bound.

With L(f, T) = sum_k lambda_k E[ |x - T_k(x)|^2 / 2 - f_k(T_k(x)) ], d1 = L(f, T) - inf_T L(f, T) and
d2 = L* - inf_T L(f, T):

    sum_k lambda_k E|T_k - T*_k|^2  <=  (2 / beta) (sqrt d1 + sqrt d2)^2

Proof of the bound. Let f be congruent and y -> c_k(x, y) - f_k(y) beta-strongly convex for each x, with
minimiser Y_k(x). Strong convexity gives sum_k lambda_k E|T_k - Y_k|^2 <= 2 d1 / beta. With the true maps,
congruence and the common image Q of all T*_k give sum_k lambda_k E f_k(T*_k) = E_Q sum_k lambda_k f_k = 0, so
that L(f, T*) is the primal optimum L*, and likewise sum_k lambda_k E|T*_k - Y_k|^2 <=
2 (L(f, T*) - inf_T L(f, T)) / beta = 2 d2 / beta. Minkowski's inequality adds the two.

beta is the smallest eigenvalue of 1 - Hessian f_k that is found between the points that the proof compares,
T_k, T*_k and Y_k: an estimate from samples, not a certificate.
"""

import math

import torch
from torch import Tensor, nn

from benchmarks.gaussians import Gaussians


def of_own_source(potentials: nn.Module, y: Tensor) -> Tensor:
    """f_k(y) at points of each source, [K,N,D] -> [K,N]."""
    sources, count, _ = y.shape
    return potentials(y.flatten(0, 1)).view(sources, count, sources).diagonal(dim1=0, dim2=2).T


def inner_minimiser(potentials: nn.Module, x: Tensor, start: Tensor, steps: int = 100) -> Tensor:
    """Y_k(x) = argmin_y |x - y|^2 / 2 - f_k(y) of samples of each source, [K,N,D], by L-BFGS from `start`."""
    y = start.detach().clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([y], max_iter=steps, tolerance_grad=1e-9, tolerance_change=1e-14,
                                  history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = ((x - y).square().sum(2) / 2 - of_own_source(potentials, y)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return y.detach()


def smallest_curvature(potentials: nn.Module, points: Tensor) -> float:
    """Smallest eigenvalue of 1 - Hessian f_k over points of each source, [K,N,D]."""
    smallest = math.inf
    for k, of_source in enumerate(points):
        hessian = torch.func.jacrev(torch.func.jacrev(lambda y, k=k: potentials(y[None])[0, k]))
        hessians = torch.func.vmap(hessian, chunk_size=64)(of_source)
        curvature = torch.linalg.eigvalsh(torch.eye(points.shape[2], dtype=points.dtype) - hessians)
        smallest = min(smallest, float(curvature.min()))
    return smallest


def duality_gaps(truth: Gaussians, maps: nn.Module, potentials: nn.Module, generator: torch.Generator,
                 count: int = 1000) -> dict[str, float]:
    """gap_inner, gap_outer and bound, from `count` samples of each source, in float64.

    beta is from 4 to 64 of them. Free potentials are made congruent first: the dual bounds nothing otherwise.
    L* = L(f, T*) is taken from the samples, so that both gaps are means of differences, sample by sample,
    from the inner minimum, none of them negative.
    """
    maps, potentials = maps.double(), potentials.double().requires_grad_(False)
    potentials.lambdas, potentials.exact = potentials.lambdas.double(), True
    x = truth.sample(count, generator).double()
    with torch.no_grad():
        y, true = maps(x), truth.transport(x)
    best = inner_minimiser(potentials, x, y)

    def value(at: Tensor) -> float:
        """L(f, .) of the points, [K,N,D]."""
        with torch.no_grad():
            samples = (x - at).square().sum(2) / 2 - of_own_source(potentials, at)
            return float((truth.lambdas * samples.mean(1)).sum())

    gap_inner, gap_outer = value(y) - value(best), value(true) - value(best)
    few = max(4, min(64, 512 // x.shape[2]))
    between = torch.cat([(best + share * (other - best))[:, :few]
                         for other in (y, true) for share in (0.0, 0.5, 1.0)], dim=1)
    beta = smallest_curvature(potentials, between)
    roots = math.sqrt(max(gap_inner, 0)) + math.sqrt(max(gap_outer, 0))
    bound = 2 / beta * roots ** 2 if beta > 0 else math.inf
    return {"gap_inner": gap_inner, "gap_outer": gap_outer, "bound": bound}
