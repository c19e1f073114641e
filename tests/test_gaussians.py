"""By train.py's losses and congruence the alternation finds Gaussian barycenters; it fails where it must."""

import json

import pytest
import torch

from benchmarks.duality_gaps import duality_gaps, inner_minimiser
from benchmarks.gaussian_barycenter import Schedule, public_files, table, train
from benchmarks.gaussians import MEANS, Gaussians, bw2_uvp, l2_uvp
from utils.errors import InputError

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


class Quadratic(torch.nn.Module):
    """Potentials y.H_k y / 2, as `duality_gaps` takes them; H [K,D,D]."""

    def __init__(self, h: torch.Tensor, lambdas: torch.Tensor) -> None:
        super().__init__()
        self.h, self.lambdas, self.exact = h, lambdas, True

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return torch.einsum("nd,kde,ne->nk", y, self.h, y) / 2


def test_the_true_potentials_close_the_duality_gap(truth):
    """H_k = 1 - A_k^-1 is optimal; a congruent change (lambda is (1, 1, 2) / 4) opens both gaps."""
    h = torch.eye(2) - torch.linalg.inv(truth.maps)
    change = torch.tensor([[[0.02, 0.01], [0.01, -0.03]]]).double() * torch.tensor([1, 1, -1])[:, None, None]
    for potentials, low, high in ((h, -1e-9, 1e-9), (h + change, 1e-5, 1e-2)):
        maps = torch.nn.Identity()
        maps.forward = truth.transport
        gaps = duality_gaps(truth, maps, Quadratic(potentials, truth.lambdas),
                            torch.Generator().manual_seed(0), count=300)
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


@pytest.mark.parametrize("how, least", [
    (dict(objective_lambdas=torch.full((3,), 1 / 3)), 10),      # other weights than the congruence's
    (dict(scheme="shared"), 10),                                # one map for sources that overlap
    (dict(cost="root_mean_square"), 10),                               # the distance, not squared
])
def test_negative_controls(truth, how, least):
    assert not error(truth, **how)[0] < least


def test_uniform_family_has_the_gaussian_moments_and_one_barycenter():
    truth = Gaussians.random(2, [0.1, 0.2, 0.3, 0.4], "normal", seed=0, family="uniform")
    x = truth.sample(100_000, torch.Generator().manual_seed(0)).double()
    centred = x - x.mean(1, keepdim=True)
    moments = centred.mT @ centred / x.shape[1]
    torch.testing.assert_close(moments, truth.covariances, rtol=0.02, atol=0.02)
    back = (truth.transport(x) - truth.mean) @ torch.linalg.inv(torch.linalg.cholesky(truth.covariance)).T
    # The same law for all four: its fourth moments, too, which those of C_k^1/2 U would not share.
    fourth = torch.einsum("kni,knj->kij", back**2, back**2) / x.shape[1]
    assert (fourth - fourth.mean(0)).abs().max() < 0.03
    mean = torch.einsum("k,kde->de", truth.lambdas, torch.linalg.inv(truth.maps))
    assert (mean - torch.eye(2)).norm() < 1e-8              # by which Q is the barycenter


def test_public_instances(tmp_path):
    truth = Gaussians.random(2, [1 / 3] * 3, "zero", seed=0)
    content = {f"sampler_{k}": {"mean": truth.means[k].tolist(), "cov": truth.covariances[k].tolist()}
               for k in range(3)}
    content["ground_truth_sampler"] = {"mean": [0, 0], "cov": truth.covariance.tolist()}
    path = tmp_path / "some_2.json"
    path.write_text(json.dumps(content))
    torch.testing.assert_close(Gaussians.read(path).maps, truth.maps)
    assert public_files(tmp_path, [2, 64]) == [path]
    with pytest.raises(InputError, match="no file .* D found: 2"):
        public_files(tmp_path, [64])
    content["ground_truth_sampler"]["cov"][0][0] *= 1.1
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="off the fixed point's"):
        Gaussians.read(path)
    path.write_text("{}")
    with pytest.raises(InputError, match="expected JSON with mean and cov"):
        Gaussians.read(path)


def test_published_rows_for_their_instances_alone():
    row = {"D": 64, "sources": "sampler_stats_64", "scheme": "exact"}
    row |= dict.fromkeys(("l2_uvp", "bw2_uvp", "bound", "error", "seconds"), 0.5)
    assert table([row]).count("NOTWB") == table([row, row | {"scheme": "identity"}]).count("NOTWB") == 1
    for other in ({"sources": "mine_64"}, {"D": 128}):
        assert "NOTWB" not in table([row | other])
