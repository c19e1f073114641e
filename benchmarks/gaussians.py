"""Gaussian sources with known barycenter: the ground truth of benchmarks.gaussian_barycenter, in float64.

Quadratic cost |x - y|^2 / 2. Korotin et al.'s benchmark: covariances R diag(w^2) R^T, R random orthogonal,
w log-spaced in [0.5, 2]. The family `uniform` has the same moments and affine maps A_k. Its barycenter
is a stretched cube S^1/2 U, its sources are the parallelepipeds A_k^-1 S^1/2 U. (C_k^1/2 U would not do: the
A_k would turn the cube in K ways; only laws that rotations leave alone form such a family.)
"""

import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from utils.errors import InputError

FAMILIES = ("gaussian", "uniform")
MEANS = ("zero", "normal", "apart")     # zero, N(0, 1), or 16 from one another


def sqrtm(a: Tensor) -> Tensor:
    """Square root of symmetric positive semi-definite matrices [...,D,D]."""
    values, vectors = torch.linalg.eigh(a)
    return (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT


def squared_bures_wasserstein(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor,
                              covariance_b: Tensor) -> Tensor:
    """|m_a - m_b|^2 + tr(A + B - 2 (B^1/2 A B^1/2)^1/2); means [...,D], covariances [...,D,D] -> [...]."""
    root = sqrtm(covariance_b)
    cross = sqrtm(root @ covariance_a @ root)
    trace = torch.diagonal(covariance_a + covariance_b - 2 * cross, dim1=-2, dim2=-1).sum(-1)
    return (mean_a - mean_b).square().sum(-1) + trace


def moments(points: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D,D] of [...,D], float64."""
    points = points.flatten(0, -2).double()
    return points.mean(0), torch.cov(points.T, correction=0)


def distances(sources: Iterable[Tensor]) -> list[float]:
    """Squared Bures-Wasserstein distance between two sources' points [...,D], of each pair."""
    pairs = itertools.combinations(map(moments, sources), 2)
    return [float(squared_bures_wasserstein(*a, *b)) for a, b in pairs]


@dataclass
class Gaussians:
    """K sources N(m_k, C_k), weights lambda_k, barycenter N(m, S) and maps T*_k(x) = m + A_k (x - m_k)."""

    lambdas: Tensor             # [K]
    means: Tensor               # m_k, [K,D]
    covariances: Tensor         # C_k, [K,D,D]
    mean: Tensor                # m, [D]
    covariance: Tensor          # S, [D,D]
    maps: Tensor                # A_k, [K,D,D]
    family: str                 # one of FAMILIES

    @classmethod
    def random(cls, dim: int, lambdas: list[float], means: str, seed: int,
               family: str = "gaussian") -> "Gaussians":
        """A random instance, `means` one of MEANS, `family` one of FAMILIES."""
        generator, sources = torch.Generator().manual_seed(seed), len(lambdas)
        noise = torch.randn(sources, dim, dim, generator=generator, dtype=torch.float64)
        rotations = torch.linalg.qr(noise)[0]
        scales = torch.logspace(-1, 1, dim, base=2, dtype=torch.float64).square()
        covariances = (rotations * scales) @ rotations.mT
        centres = torch.randn(sources, dim, generator=generator, dtype=torch.float64) * (means == "normal")
        if means == "apart":
            # A regular polygon of radius 9 in a random plane: three sources, of spread up to 2, are 16 apart.
            angles = 2 * math.pi / sources * torch.arange(sources, dtype=torch.float64)
            centres = 9 * torch.stack([angles.cos(), angles.sin()], dim=1) @ rotations[0, :, :2].T
        return cls.of(torch.tensor(lambdas, dtype=torch.float64), centres, covariances, family)

    @classmethod
    def of(cls, lambdas: Tensor, means: Tensor, covariances: Tensor, family: str = "gaussian") -> "Gaussians":
        """Sources of these moments and their barycenter, all float64.

        It is the fixed point of S <- S^-1/2 (sum_k lambda_k (S^1/2 C_k S^1/2)^1/2)^2 S^-1/2.
        """
        s = torch.eye(means.shape[1], dtype=torch.float64)
        for _ in range(1000):
            root = sqrtm(s)
            inverse = torch.linalg.inv(root)
            middle = (lambdas[:, None, None] * sqrtm(root @ covariances @ root)).sum(0)
            previous, s = s, inverse @ middle @ middle @ inverse
            if (s - previous).norm() < 1e-14 * s.norm():
                break
        roots = sqrtm(covariances)
        inverses = torch.linalg.inv(roots)
        maps = inverses @ sqrtm(roots @ s @ roots) @ inverses
        return cls(lambdas, means, covariances, lambdas @ means, s, maps, family)

    @classmethod
    def read(cls, path: Path) -> "Gaussians":
        """An instance of Howard et al. (arXiv 2506.17197): JSON, sampler_0 ... and ground_truth_sampler.

        Weights are uniform. InputError where the file is none, or its barycenter not that of the fixed point.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            names = [f"sampler_{k}" for k in range(len(content) - 1)]
            means, covariances = (torch.tensor([content[name][part] for name in names], dtype=torch.float64)
                                  for part in ("mean", "cov"))
            given = torch.tensor(content["ground_truth_sampler"]["cov"], dtype=torch.float64)
            sources, dim = means.shape
            truth = cls.of(torch.full((sources,), 1 / sources, dtype=torch.float64), means, covariances)
            difference = float((truth.covariance - given).norm() / given.norm())
        except (ValueError, KeyError, TypeError, RuntimeError, IndexError) as error:
            raise InputError(f"{path}: {type(error).__name__}, expected JSON with mean and cov of sampler_0, "
                             "sampler_1, ... and ground_truth_sampler") from None
        if not difference < 1e-4:
            raise InputError(f"{path}: its barycenter's covariance is {difference:.2g} off the fixed point's")
        return truth

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` samples of each source, [K,count,D] float32."""
        shape = len(self.lambdas), count, self.means.shape[1]
        if self.family == "uniform":                        # U of variance 1; A_k^-1 S^1/2, transposed
            noise = math.sqrt(12) * (torch.rand(shape, generator=generator) - 0.5)
            spread = sqrtm(self.covariance) @ torch.linalg.inv(self.maps)
            return self.means.float()[:, None] + noise @ spread.float()
        noise = torch.randn(shape, generator=generator)
        return self.means.float()[:, None] + noise @ torch.linalg.cholesky(self.covariances).float().mT

    def transport(self, x: Tensor) -> Tensor:
        """T*_k(x) of samples of each source, [K,N,D]."""
        return self.mean.to(x) + (x - self.means.to(x)[:, None]) @ self.maps.to(x).mT


def l2_uvp(truth: Gaussians, transported: Tensor, x: Tensor) -> float:
    """100 sum_k lambda_k E|T_k(x) - T*_k(x)|^2 / tr S, percent; transported and x: [K,N,D]."""
    error = (transported.double() - truth.transport(x.double())).square().sum(2).mean(1)
    return float(100 * (truth.lambdas * error).sum() / truth.covariance.trace())


def bw2_uvp(truth: Gaussians, transported: Tensor) -> float:
    """100 sum_k lambda_k BW_2^2(T_k#P_k, Q) / tr S, percent, by samples' moments; transported: [K,N,D]."""
    distance = torch.stack([squared_bures_wasserstein(*moments(points), truth.mean, truth.covariance)
                            for points in transported])
    return float(100 * (truth.lambdas * distance).sum() / truth.covariance.trace())
