"""The vectorised losses against naive double loops, edge cases, and their gradient over two processes."""

import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from losses.barycenter import (
    COSTS,
    congruence_error,
    congruence_penalty,
    dual_objective,
    dual_terms,
    potential_objective,
    reconstruction_loss,
    root_mean_square,
    sample_weights,
    source_weights,
    transport_cost,
)
from losses.residual import contrastive, orthogonality
from models.potentials import Standardize
from utils.sides import Side

LAMBDAS, PROBABILITIES = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.5, 0.25, 0.25])


def latents(batch: int = 6, sources: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    z = torch.randn(batch, 8, 3, 4, generator=generator, dtype=torch.float64)
    b = z + 0.5 * torch.randn(batch, 8, 3, 4, generator=generator, dtype=torch.float64) + 0.2
    return z, b, torch.randint(sources, (batch,), generator=generator)


def unit(v: torch.Tensor) -> torch.Tensor:
    return v.flatten() / v.flatten().norm()


def naive_cost(z, b, source, gamma, tau) -> list[float]:
    """C_i, sample by sample, as the equations are written."""
    r, costs = z - b, []
    for i in range(len(z)):
        distance = math.sqrt(((z[i] - b[i]) ** 2).mean())
        l_ort = sum(float(unit(b[i]) @ unit(r[j])) ** 2 for j in range(len(z)))
        every = [math.exp(float(unit(r[i]) @ unit(r[j])) / tau) for j in range(len(z))]
        same = sum(every[j] for j in range(len(z)) if source[j] == source[i])
        costs.append(distance + gamma * (-math.log(same / sum(every)) + l_ort))
    return costs


def test_dual_objective_equals_the_double_loop():
    z, b, source = latents()
    f = torch.rand(6, 3, dtype=torch.float64)
    weights = sample_weights(source, LAMBDAS, PROBABILITIES)
    costs = transport_cost(z, b, source, "root_mean_square", gamma=0.05, tau=0.07)
    loss = dual_objective(costs["cost"], f, source, weights)
    terms, samples = dual_terms(loss, costs, f, source, weights)
    costs = naive_cost(z, b, source, gamma=0.05, tau=0.07)
    expected = 0.0
    for i in range(6):
        k = int(source[i])
        expected += float(LAMBDAS[k] / PROBABILITIES[k]) / 6 * (costs[i] - float(f[i, k]))
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert set(terms) == {"dual", "distance", "contrastive", "orthogonality", "potential"}
    assert float(terms["dual"]) == pytest.approx(expected, rel=1e-5)
    assert samples["cost"].tolist() == pytest.approx(costs, rel=1e-5)
    assert samples["potential"].tolist() == [float(f[i, source[i]]) for i in range(6)]


def test_potential_objective_and_penalty_equal_the_loop():
    _, _, source = latents()
    f = torch.randn(6, 3)
    weights = sample_weights(source, LAMBDAS, PROBABILITIES)
    expected = sum(float(weights[i] * f[i, source[i]]) for i in range(6))
    penalty = sum(10 * float(sum(LAMBDAS[k] * f[i, k] for k in range(3))) ** 2 for i in range(6)) / 6
    assert float(potential_objective(f, source, weights, LAMBDAS)) == pytest.approx(expected, rel=1e-5)
    assert float(congruence_penalty(f, LAMBDAS)) == pytest.approx(penalty, rel=1e-5)
    assert float(congruence_error(f, LAMBDAS)) == pytest.approx(math.sqrt(penalty / 10), rel=1e-5)
    penalised = potential_objective(f, source, weights, LAMBDAS, rho=10.0)
    assert float(penalised) == pytest.approx(expected + penalty, rel=1e-5)


def test_costs_and_their_terms():
    z, b, source = latents()
    squares = [float(((z[i] - b[i]) ** 2).sum()) for i in range(6)]
    size = z[0].numel()
    expected = {"root_mean_square": [(s / size) ** 0.5 for s in squares],
                "mean_square": [s / size for s in squares]}
    assert set(expected) == set(COSTS)
    for name, values in expected.items():
        terms = transport_cost(z, b, source, name, gamma=0.0)
        assert set(terms) == {"cost", "distance"}
        assert terms["cost"].tolist() == pytest.approx(values, rel=1e-6)
        terms = transport_cost(z, b, source, name, gamma=0.3)
        latent = terms["contrastive"] + terms["orthogonality"]
        assert torch.allclose(terms["cost"], terms["distance"] + 0.3 * latent) and latent.min() > 0


@pytest.mark.parametrize("batch, sources", [(1, 1), (1, 3), (4, 1)])
def test_one_sample_or_one_source_is_finite(batch, sources):
    z, b, source = latents(batch, sources)
    z.requires_grad_()
    assert torch.allclose(contrastive(z - b, source), torch.zeros(batch, dtype=torch.float64))
    cost = transport_cost(z, b, source)["cost"]
    loss = dual_objective(cost, torch.zeros(batch, 3), source, torch.full((batch,), 1 / batch))
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


def test_zero_residual_has_finite_gradients():
    z, _, source = latents()
    b = z.clone().requires_grad_()
    (root_mean_square(z, b) + contrastive(z - b, source) + orthogonality(b, z - b)).sum().backward()
    assert b.grad.isfinite().all()


def test_weights_estimate_the_objective_without_bias():
    """With sources drawn unequally, the sampler's expectation is sum_k lambda_k E_k: values 1, 10, 100."""
    generator = torch.Generator().manual_seed(0)
    source = torch.multinomial(PROBABILITIES, 400_000, replacement=True, generator=generator)
    value = torch.tensor([1.0, 10.0, 100.0])[source]
    estimate = float((sample_weights(source, LAMBDAS, PROBABILITIES).double() * value).sum())
    assert estimate == pytest.approx(0.2 * 1 + 0.3 * 10 + 0.5 * 100, rel=0.01)


def test_source_weights():
    assert source_weights([100, 300], "inverse").tolist() == pytest.approx([0.75, 0.25])
    assert source_weights([100, 300], "uniform").tolist() == pytest.approx([0.5, 0.5])
    assert source_weights([100, 300], [1.0, 4.0]).tolist() == pytest.approx([0.2, 0.8])
    for wrong in ([1.0], [1.0, -1.0]):
        with pytest.raises(ValueError, match="expected inverse, uniform or 2 positive numbers"):
            source_weights([100, 300], wrong)


def toy_gradients(samples: slice) -> list[torch.Tensor]:
    """Gradients of a small encoder and map on some of eight fixed samples, averaged over the processes."""
    torch.manual_seed(0)
    encoder, transport = (torch.nn.Conv2d(3, 3, 3, padding=1).double() for _ in range(2))
    potentials = torch.nn.Linear(3 * 6 * 6, 3).double()
    image, clean = torch.rand(2, 8, 3, 6, 6, dtype=torch.float64)
    source = torch.tensor([0, 1, 2, 0, 1, 1, 2, 0])
    image, clean, source = image[samples], clean[samples], source[samples]
    z = encoder(image)
    b = transport(z)
    weights = sample_weights(source, LAMBDAS.double(), PROBABILITIES.double())
    f = potentials(b.flatten(1))
    cost = transport_cost(z, b, source, gamma=0.5)["cost"]
    loss = reconstruction_loss(b, clean)[0] + dual_objective(cost, f, source, weights)
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
    mp.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    single = toy_gradients(slice(0, 8))
    for rank in range(2):
        gradients = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for ours, expected in zip(gradients, single, strict=True):
            assert (ours - expected).norm() <= 1e-4 * expected.norm()


def test_standardized_latents_have_no_scale():
    """Channels of any mean and deviation become N(0, 1) by running means, the plain mean at first."""
    torch.manual_seed(0)
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
    assert not any(p.requires_grad for p in standardize.parameters())
    before = standardize.mean.clone()
    standardize.update(z * torch.nan)                           # of a step that is not applied
    assert torch.equal(standardize.mean, before) and standardize.steps == 501


@pytest.mark.parametrize("size", [(32, 48), (20, 33)])
def test_reconstruction_in_two_bands(size):
    clean, rest = torch.rand(2, 2, 3, *size, dtype=torch.float64)
    rest = rest - 0.5
    whole, mean = reconstruction_loss(clean + rest, clean)
    assert mean == whole
    assert whole.item() == pytest.approx(rest.abs().mean().item())
    brighter, mean = reconstruction_loss(clean + 0.2, clean, 0.03)                # all of it in the low band
    assert brighter.item() == pytest.approx(0.03 * 0.2) and mean.item() == pytest.approx(0.2)
    stripes = torch.zeros(2, 3, 16, 16, dtype=torch.float64)
    stripes[..., ::2] = 1                                                   # all of it in the other
    grey = torch.full_like(stripes, 0.5)
    assert reconstruction_loss(stripes, grey, 0.03)[0].item() == pytest.approx(0.5)
