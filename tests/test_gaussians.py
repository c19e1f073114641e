"""By train.py's losses and congruence the alternation finds Gaussian barycenters; it fails where it must."""

import pytest
import torch

from benchmarks.duality_gaps import duality_gaps, inner_minimiser
from benchmarks.gaussian_barycenter import Schedule, train
from benchmarks.gaussians import MEANS, Gaussians, bw2_uvp, l2_uvp

UNEQUAL = [0.25, 0.25, 0.5]
SHORT = Schedule(steps=100, batch=64, potential_batch=128, learning_rate=3e-3)


@pytest.mark.parametrize("dim, means", [*zip([2, 16, 64], MEANS, strict=True)])
def test_closed_form(dim, means):
    """In float64, untrained: T*_k#P_k = Q, and sum_k lambda_k A_k^-1 = 1, by which Q is the barycenter."""
    truth = Gaussians.random(dim, UNEQUAL, means, seed=1)
    pushed = truth.maps @ truth.covariances @ truth.maps.mT
    torch.testing.assert_close(pushed, truth.covariance.expand_as(truth.covariances))
    mean = torch.einsum("k,kde->de", truth.lambdas, torch.linalg.inv(truth.maps))
    torch.testing.assert_close(mean, torch.eye(dim, dtype=torch.float64))
    torch.testing.assert_close(truth.mean, truth.lambdas @ truth.means)
    x = truth.sample(50_000, torch.Generator().manual_seed(0))
    assert l2_uvp(truth, truth.transport(x), x) < 1e-8
    assert bw2_uvp(truth, truth.transport(x)) < 0.05 < 5 < bw2_uvp(truth, x)


def test_the_true_potentials_close_the_duality_gap(truth):
    """H_k = 1 - A_k^-1 is optimal; a congruent change (lambda is (1, 1, 2) / 4) opens both gaps."""
    h = torch.eye(2) - torch.linalg.inv(truth.maps)
    change = torch.tensor([[[0.02, 0.01], [0.01, -0.03]]]).double() * torch.tensor([1, 1, -1])[:, None, None]
    maps, potentials = torch.nn.Identity(), torch.nn.Identity()
    maps.forward, potentials.lambdas, potentials.exact = truth.transport, truth.lambdas, True
    for hessians, low, high in ((h, -1e-9, 1e-9), (h + change, 1e-5, 1e-2)):
        potentials.forward = lambda y, h=hessians: torch.einsum("nd,kde,ne->nk", y, h, y) / 2
        gaps = duality_gaps(truth, maps, potentials, torch.Generator().manual_seed(0), count=300)
        assert low <= gaps["gap_outer"] <= high and low <= gaps["gap_inner"] <= high


@pytest.fixture(scope="module")
def truth() -> Gaussians:
    return Gaussians.random(2, UNEQUAL, "zero", seed=0)


def error(truth: Gaussians, **how) -> tuple[float, tuple]:
    sides = train(truth, SHORT, **how)
    x = truth.sample(20_000, torch.Generator().manual_seed(5))
    with torch.no_grad():
        return l2_uvp(truth, sides[0](x), x), sides


def test_training_finds_the_barycenter_and_its_bound_holds(truth):
    l2, (maps, potentials) = error(truth)
    assert l2 < 0.6                                                         # the identity has 33
    gaps = duality_gaps(truth, maps, potentials, torch.Generator().manual_seed(1), count=300)
    distance = l2 / 100 * float(truth.covariance.trace())
    assert gaps["gap_inner"] > 0 and gaps["gap_outer"] > 0 and distance < gaps["bound"] < 20 * distance
    x = truth.sample(10, torch.Generator().manual_seed(2)).double()
    best = inner_minimiser(potentials, x, maps(x))
    best.requires_grad_(True)
    value = (x - best).square().sum(2) / 2 - torch.stack([potentials(best[k])[:, k] for k in range(3)])
    assert torch.autograd.grad(value.sum(), best)[0].abs().max() < 1e-5     # a minimiser indeed


@pytest.mark.parametrize("how", [
    dict(objective_lambdas=torch.full((3,), 1 / 3)),            # other weights than the congruence's
    dict(scheme="shared"),                                      # one map for sources that overlap
    dict(cost="root_mean_square"),                              # the distance, not squared
])
def test_negative_controls(truth, how):
    assert not error(truth, **how)[0] < 10
