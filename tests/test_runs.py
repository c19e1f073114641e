"""What losses.csv tells of the transport, against loops; the inner gap, against one that is known."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.inner_gap import inner_gap
from losses.barycenter import transport_cost
from utils.options import Source, TrainOptions
from utils.runs import LossTable, Run


def test_statistics_of_sources_equal_the_loop(tmp_path):
    options = TrainOptions(name="run", output=str(tmp_path), steps=1, sources=[
        Source(name="noise", bundled=["coffee.png"], degradation="noise", levels=[25])])
    table = LossTable(Run(options, None, torch.device("cpu")), ["noise", "rain", "haze"], [])
    assert all(math.isnan(value) for value in table.take_means().values())              # nothing yet
    generator = torch.Generator().manual_seed(0)
    cost, f = torch.rand(20, generator=generator), torch.randn(20, generator=generator)
    source = torch.randint(-1, 2, (20,), generator=generator)                           # -1: of none
    losses = torch.tensor([1.0, torch.nan, 2.0, 6.0])                                   # not finite: no part
    for part, loss in zip((slice(0, 7), slice(7, 9), slice(9, 20), slice(20, 20)), losses, strict=True):
        table.add({"map_loss": loss}, {"cost": cost[part], "potential": f[part]}, source[part])
    means = table.take_means()
    for k, name in enumerate(("noise", "rain")):
        costs, values = cost[source == k], f[source == k]
        assert means[f"cost_{name}"] == pytest.approx(float(costs.mean()), rel=1e-6)
        assert means[f"potential_mean_{name}"] == pytest.approx(float(values.mean()), rel=1e-6)
        assert means[f"potential_spread_{name}"] == pytest.approx(float(values.std(correction=0)), rel=1e-6)
    assert means["map_loss"] == 3 and math.isnan(means["cost_haze"]) and math.isnan(means["dual"])
    assert all(math.isnan(value) for value in table.take_means().values())


class Shift(nn.Module):
    """T(z) = z + shift."""

    def __init__(self, shift: torch.Tensor) -> None:
        super().__init__()
        self.shift = nn.Parameter(shift, requires_grad=False)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z + self.shift


def test_inner_gap_of_a_known_problem():
    """Cost |z - b|^2 / 2, f(b) = a.b, T(z) = z + shift: inf_T L at shift = a, the gap |shift - a|^2 / 2."""
    a = torch.tensor([1.0, -2.0, 0.5])
    batches = [(torch.randn(8, 3, generator=torch.Generator().manual_seed(i)),
                torch.zeros(8, dtype=torch.long), torch.full((8,), 1 / 8)) for i in range(200)]

    def cost(z: torch.Tensor, b: torch.Tensor, source: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"cost": 1.5 * transport_cost(z, b, source, "mean_square", gamma=0.0)["cost"]}

    for shift in (torch.zeros(3), a + 0.3, a.clone()):
        net = SimpleNamespace(transport_map=Shift(shift.clone()), latent_norm=nn.Identity(),
                              encode=lambda degraded: (degraded, []))
        random = torch.get_rng_state()
        gap = inner_gap(net, lambda b: (b @ a)[:, None], cost, batches[:190], batches[190:],
                        learning_rate=0.05)
        assert gap == pytest.approx(float((shift - a).square().sum() / 2), abs=2e-3)
        after = net.transport_map.shift                         # the run's T stays
        assert torch.equal(after, shift) and not after.requires_grad
        assert torch.equal(torch.get_rng_state(), random)
