"""What losses.csv tells of the transport, against loops; the inner gap, against one that is known."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.inner_gap import inner_gap
from losses.barycenter import transport_cost
from utils.runs import LossTable


def test_means_of_sources_equal_the_loop():
    generator = torch.Generator().manual_seed(0)
    run = SimpleNamespace(device=torch.device("cpu"), begin_table=lambda *_: None)
    table = LossTable(run, ["noise", "rain", "haze"], [])
    assert all(math.isnan(value) for value in table.take_means().values())              # nothing yet
    cost, f = torch.rand(20, generator=generator), torch.randn(20, generator=generator)
    source = torch.randint(-1, 2, (20,), generator=generator)                           # -1: clean inputs
    for part in (slice(0, 7), slice(7, 20)):
        table.add({}, {"cost": cost[part], "potential": f[part]}, source[part])
    means = table.take_means()
    for k, name in enumerate(("noise", "rain")):
        costs, values = cost[source == k], f[source == k]
        assert means[f"cost_{name}"] == pytest.approx(float(costs.mean()), rel=1e-6)
        assert means[f"potential_mean_{name}"] == pytest.approx(float(values.mean()), rel=1e-6)
        assert means[f"potential_spread_{name}"] == pytest.approx(float(values.std(correction=0)), rel=1e-6)
    assert math.isnan(means["cost_haze"])
    assert all(math.isnan(value) for value in table.take_means().values())


class Shift(nn.Module):
    """T(z) = z + shift."""

    def __init__(self, shift: torch.Tensor) -> None:
        super().__init__()
        self.shift = nn.Parameter(shift)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z + self.shift


class Net(nn.Module):
    """The stages that the inner gap needs, the identity but for T."""

    def __init__(self, shift: torch.Tensor) -> None:
        super().__init__()
        self.transport_map, self.latent_norm = Shift(shift), nn.Identity()

    def encode(self, degraded: torch.Tensor) -> tuple[torch.Tensor, list]:
        return degraded, []


def test_inner_gap_of_a_known_problem():
    """Cost |z - b|^2 / 2, f(b) = a.b, T(z) = z + shift: inf_T L at shift = a, the gap |shift - a|^2 / 2."""
    a = torch.tensor([1.0, -2.0, 0.5])
    batches = [(torch.randn(8, 3, generator=torch.Generator().manual_seed(i)),
                torch.zeros(8, dtype=torch.long), torch.full((8,), 1 / 8)) for i in range(200)]

    def cost(z: torch.Tensor, b: torch.Tensor, source: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"cost": 1.5 * transport_cost(z, b, source, "mean_square", gamma=0.0)["cost"]}

    for shift in (torch.zeros(3), a + 0.3, a.clone()):
        net = Net(shift.clone()).requires_grad_(False)
        random = torch.get_rng_state()
        gap = inner_gap(net, lambda b: (b @ a)[:, None], cost, batches[:190], batches[190:],
                        learning_rate=0.05)
        assert gap == pytest.approx(float((shift - a).square().sum() / 2), abs=2e-3)
        after = net.transport_map.shift                         # the run's T stays
        assert torch.equal(after, shift) and not after.requires_grad
        assert torch.equal(torch.get_rng_state(), random)
