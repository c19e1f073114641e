"""The vectorised losses against naive double loops, edge cases, and their gradient over two processes."""

import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks import plain
from benchmarks.gaussians import Gaussians, squared_bures_wasserstein
from losses import barycenter
from losses.barycenter import dual_objective, potential_objective, sample_weights, transport_cost
from losses.residual import contrastive
from models.potentials import Standardize
from utils.sides import Side

LAMBDAS, PROBABILITIES = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.5, 0.25, 0.25])
SOURCE = torch.tensor([0, 2, 1, 2, 0, 1])


def latents(batch: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    z, noise = torch.randn(2, batch, 8, 3, 4, dtype=torch.float64)
    return z, z + 0.5 * noise + 0.2


def test_objectives_equal_the_double_loop():
    z, b = latents()
    f = torch.randn(6, 3, dtype=torch.float64)
    lambdas, weights = LAMBDAS.double(), sample_weights(SOURCE, LAMBDAS, PROBABILITIES)
    costs = transport_cost(z, b, SOURCE, gamma=0.05, tau=0.07)
    loss = dual_objective(costs["cost"], f, SOURCE, weights)
    terms = barycenter.dual_terms(loss, costs, weights)
    naive, cost, potential = plain.transport_cost(z, b, SOURCE, gamma=0.05, tau=0.07), 0.0, 0.0
    for i, k in enumerate(SOURCE.tolist()):
        weight = float(LAMBDAS[k] / PROBABILITIES[k]) / 6
        cost, potential = cost + weight * float(naive[i]), potential + weight * float(f[i, k])
        assert float(costs["cost"][i]) == pytest.approx(float(naive[i]), rel=1e-5)
    assert float(loss) == float(terms["dual"]) == pytest.approx(cost - potential, rel=1e-5)
    near = pytest.approx([cost, potential], rel=1e-5)
    assert [float(terms[name]) for name in ("cost", "potential")] == near
    assert set(terms) == {"dual", "cost", "distance", "contrastive", "orthogonality", "potential"}
    penalty = sum(10 * float(sum(lambdas[k] * f[i, k] for k in range(3))) ** 2 for i in range(6)) / 6
    for value, loop in ((potential_objective(f, SOURCE, weights, lambdas), potential),
                        (potential_objective(f, SOURCE, weights, lambdas, rho=10.0), potential + penalty),
                        (barycenter.congruence_error(f, lambdas), math.sqrt(penalty / 10))):
        assert float(value) == pytest.approx(loop, rel=1e-5)


def test_clean_inputs_are_of_no_source():
    """They weigh nothing, and no degraded input sees them."""
    z, b = latents(8)
    source, degraded = torch.tensor([0, -1, 2, 1, -1, 2, 0, 1]), [0, 2, 3, 5, 6, 7]
    costs = transport_cost(z, b, source)["cost"]
    alone = transport_cost(z[degraded], b[degraded], source[degraded])["cost"]
    torch.testing.assert_close(costs[degraded], alone)
    weights, f = sample_weights(source, LAMBDAS, PROBABILITIES), torch.rand(8, 3)
    weights_alone = sample_weights(source[degraded], LAMBDAS, PROBABILITIES)
    torch.testing.assert_close(8 * weights[degraded], 6 * weights_alone)
    for objective, of_degraded in (
        (dual_objective(costs, f, source, weights),
         dual_objective(alone, f[degraded], source[degraded], weights_alone)),
        (potential_objective(f, source, weights, LAMBDAS),
         potential_objective(f[degraded], source[degraded], weights_alone, LAMBDAS)),
    ):
        torch.testing.assert_close(8 * objective, 6 * of_degraded)


def test_the_dual_value_of_the_true_potentials_is_the_closed_form():
    """L(f*) = L* for f*_k(y) = y.H_k y / 2 + h_k.y + c_k, H_k = 1 - A_k^-1; other congruent f stay below it.

    2 D points have exactly the mean and covariance of each Gaussian: all is quadratic, so the sums are the
    expectations. The minimiser over T is T_k(x) = (1 - H_k)^-1 (x + h_k), of f* the true map.
    """
    truth = Gaussians.random(5, [0.25, 0.25, 0.5], "normal", seed=1)
    steps = 5**0.5 * torch.cat([torch.eye(5), -torch.eye(5)]).double()
    z = truth.means[:, None] + steps @ torch.linalg.cholesky(truth.covariances).mT                  # [K,2D,D]
    inverse = torch.linalg.inv(truth.maps)
    h = inverse @ truth.mean - truth.means
    c = (truth.mean @ truth.mean - (inverse @ truth.mean) @ truth.mean) / 2
    change = 0.05 * torch.eye(5) * torch.tensor([1, 1, -1])[:, None, None]          # lambda: (1, 1, 2) / 4
    source = torch.arange(3).repeat_interleave(10)
    weights = sample_weights(source, truth.lambdas, torch.full((3,), 1 / 3, dtype=torch.float64))
    values = []
    for hessian in (torch.eye(5) - inverse, torch.eye(5) - inverse + change):
        b = ((z + h[:, None]) @ torch.linalg.inv(torch.eye(5) - hessian)).flatten(0, 1)
        f = torch.einsum("nd,kde,ne->nk", b, hessian, b) / 2 + b @ h.T + c
        assert barycenter.congruence_error(f, truth.lambdas) < 1e-10
        cost = 5 / 2 * transport_cost(z.flatten(0, 1), b, source, "mean_square", gamma=0.0)["cost"]
        values.append(float(dual_objective(cost, f, source, weights)))
    optimum = squared_bures_wasserstein(truth.means, truth.covariances, truth.mean, truth.covariance) / 2
    assert abs(values[0] - float(truth.lambdas @ optimum)) < 1e-10 and values[1] < values[0] - 1e-3


@pytest.mark.parametrize("cost, power", [("root_mean_square", 0.5), ("mean_square", 1)])
def test_costs_and_their_terms(cost, power):
    z, b = latents()
    expected = [(float(((z[i] - b[i]) ** 2).sum()) / z[0].numel()) ** power for i in range(6)]
    terms = transport_cost(z, b, SOURCE, cost, gamma=0.0)
    assert set(terms) == {"cost", "distance"} and terms["cost"].tolist() == pytest.approx(expected, rel=1e-6)
    terms = transport_cost(z, b, SOURCE, cost, gamma=0.3)
    latent = terms["contrastive"] + terms["orthogonality"]
    assert torch.allclose(terms["cost"], terms["distance"] + 0.3 * latent) and latent.min() > 0


@pytest.mark.parametrize("source", [[0], [1, 1, 1, 1], [-1, -1], SOURCE.tolist()])
def test_one_source_clean_inputs_alone_and_zero_residuals_are_finite(source):
    z, b = latents(len(source))
    source = torch.tensor(source)
    if len(source.unique()) == 1:
        assert contrastive(z - b, source).abs().max() < 1e-12
    for moved in (b.requires_grad_(), z.clone().requires_grad_()):
        for cost in barycenter.COSTS:
            costs = transport_cost(z, moved, source, cost)["cost"]
            (gradient,) = torch.autograd.grad(costs.sum(), moved)
            assert costs.isfinite().all() and gradient.isfinite().all()


def test_weights_estimate_the_objective_without_bias():
    """With sources drawn unequally, the sampler's expectation is sum_k lambda_k E_k: values 1, 10, 100."""
    source = torch.multinomial(PROBABILITIES, 400_000, replacement=True)
    value = torch.tensor([1.0, 10.0, 100.0])[source]
    estimate = float((sample_weights(source, LAMBDAS, PROBABILITIES).double() * value).sum())
    assert estimate == pytest.approx(0.2 * 1 + 0.3 * 10 + 0.5 * 100, rel=0.01)


def test_source_weights():
    for lambdas, weights in (("inverse", [0.75, 0.25]), ("uniform", [0.5, 0.5]), ([1.0, 4.0], [0.2, 0.8])):
        assert barycenter.source_weights([100, 300], lambdas).tolist() == pytest.approx(weights)
    for wrong in ([1.0], [1.0, -1.0]):
        with pytest.raises(ValueError, match="expected inverse, uniform or 2 positive numbers"):
            barycenter.source_weights([100, 300], wrong)


def toy_gradients(samples: slice) -> list[torch.Tensor]:
    """Gradients of a small encoder and map on some of eight fixed samples, averaged over the processes."""
    torch.manual_seed(0)
    encoder, transport = (torch.nn.Conv2d(3, 3, 3, padding=1).double() for _ in range(2))
    potentials = torch.nn.Linear(3 * 6 * 6, 3).double()
    image, clean = torch.rand(2, 8, 3, 6, 6, dtype=torch.float64)[:, samples]
    source = torch.tensor([0, 1, 2, 0, -1, 1, 2, 0])[samples]
    z = encoder(image)
    b = transport(z)
    weights = sample_weights(source, LAMBDAS.double(), PROBABILITIES.double())
    cost = transport_cost(z, b, source, gamma=0.5)["cost"]
    dual = dual_objective(cost, potentials(b.flatten(1)), source, weights)
    loss = barycenter.reconstruction_loss(b, clean)[0] + dual
    parameters = [*encoder.parameters(), *transport.parameters()]
    side = Side(parameters, torch.optim.SGD(parameters, lr=0.0))
    side.thaw()
    loss.backward()
    side.average_and_clip(loss)
    return [p.grad for p in parameters]


def one_of_two(rank: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(toy_gradients(slice(4 * rank, 4 * rank + 4)), f"{folder}/{rank}.pt")
    dist.barrier()                                              # neither leaves while the other still speaks
    dist.destroy_process_group()


def test_two_processes_give_the_gradient_of_one(tmp_path):
    mp.start_processes(one_of_two, (str(tmp_path),), nprocs=2, start_method="fork")
    single = toy_gradients(slice(0, 8))
    for rank in range(2):
        gradients = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for ours, expected in zip(gradients, single, strict=True):
            assert (ours - expected).norm() <= 1e-4 * expected.norm()


def test_standardized_latents_have_no_scale():
    """Channels of any mean and deviation become N(0, 1) by running means, the plain mean at first."""
    deviations = torch.tensor([0.1, 1.0, 10.0, 3.0, 0.5])
    z = torch.randn(6, 5, 8, 8) * deviations[:, None, None] + torch.arange(5.0)[:, None, None]
    standardize = Standardize(5)
    standardize.update(z)
    torch.testing.assert_close(standardize(z).mean(dim=(0, 2, 3)), torch.zeros(5), atol=1e-4, rtol=0)
    deviation = standardize(z).std(dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(deviation, torch.ones(5), atol=1e-3, rtol=0)
    for _ in range(500):
        standardize.update(2 * z)
    torch.testing.assert_close(standardize.mean, 2 * z.mean(dim=(0, 2, 3)), atol=1e-3, rtol=1e-3)
    before = standardize.mean.clone()
    standardize.update(z * torch.nan)                           # of a step that is not applied
    assert torch.equal(standardize.mean, before) and standardize.steps == 501


def test_reconstruction_in_two_bands():
    clean, rest = torch.rand(2, 2, 3, 20, 33, dtype=torch.float64)
    whole, mean = barycenter.reconstruction_loss(clean + rest, clean)
    assert mean == whole and whole.item() == pytest.approx(rest.abs().mean().item())
    brighter, mean = barycenter.reconstruction_loss(clean + 0.2, clean, 0.03)       # all in the low band
    assert brighter.item() == pytest.approx(0.03 * 0.2) and mean.item() == pytest.approx(0.2)
    grey = torch.full((2, 3, 16, 16), 0.5, dtype=torch.float64)
    stripes = grey + 0.5 * (-1) ** torch.arange(16)                         # all of it in the other
    assert barycenter.reconstruction_loss(stripes, grey, 0.03)[0].item() == pytest.approx(0.5)
