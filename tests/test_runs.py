"""What losses.csv tells of the transport, against loops."""

import math

import pytest
import torch

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
