"""What differs on a GPU: both schemes, graphs, fused optimizers, guard, strips, resume."""

import math
from pathlib import Path

import pytest
import torch

import train
from conftest import SMALL, read_csv, take_step, train_tiny, write_yaml
from models.baryir import BaryIR
from utils.evaluation import restore
from utils.sides import make_side

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
SCHEME = pytest.mark.parametrize("scheme", ["joint", "separate"])
OPTIMIZER = pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])


def option_file(tmp_path: Path, **changes) -> str:
    sources = [{"name": name, "bundled": ["coffee.png"], "degradation": name, "range": ends}
               for name, ends in (("noise", [5, 50]), ("lowlight", [2, 5]))]
    return write_yaml(tmp_path / "some.yml", {
        "name": "run", "output": str(tmp_path), "steps": 8, "batch": 4, "patch": 32, "workers": 0,
        "log_every": 1, "save_every": 4, "optimizer": "adamw", "learning_rate": 1e-3, "ema": 0.9,
        "balanced": True, "sources": sources, "objective": {"lambdas": "uniform"}, **changes})


def losses(folder: Path) -> list[dict[str, float]]:
    rows = read_csv(folder / "losses.csv")
    return [{name: float(value) for name, value in row.items()} for row in rows]


@SCHEME
@OPTIMIZER
def test_training_in_little_memory(tmp_path, scheme, optimizer):
    train_tiny(option_file(tmp_path, scheme=scheme, optimizer=optimizer, steps=30, clip=1.0, workers=2,
                           precision="bfloat16", recompute=True, cache=True))
    rows = losses(tmp_path / "run")
    assert all(math.isfinite(row["reconstruction"]) and row["skipped"] == 0 for row in rows)
    assert sum(row["reconstruction"] for row in rows[-5:]) < sum(row["reconstruction"] for row in rows[:5])


@SCHEME
@OPTIMIZER
def test_recorded_steps_equal_launched_ones(tmp_path, monkeypatch, scheme, optimizer):
    """Within rounding, for two sizes of batches; and a recorded run goes on in launched ones."""
    rate = 1e-3 if optimizer == "adamw" else 1e-5               # RMSprop's first steps are ten times as long
    runs, sides = [], train.make_sides
    how = dict(scheme=scheme, optimizer=optimizer, learning_rate=rate, progressive=[[10, 2, 48]], clip=1.0)
    for name in ("recorded", "launched"):
        train_tiny(option_file(tmp_path, name=name, **how, steps=20, workers=2))
        runs.append(losses(tmp_path / name))
        monkeypatch.setattr(train, "Recorded", lambda step: step)
        monkeypatch.setattr(train, "make_sides", lambda net, potentials, options, _:
                            sides(net, potentials, options))
    train_tiny(option_file(tmp_path, name="recorded", **how, steps=22, workers=2), "--resume")
    assert len(losses(tmp_path / "recorded")) == 22
    for recorded, launched in zip(*runs, strict=True):
        for name in ("reconstruction", "distance", "gradient_norm", "potential_loss"):
            near = pytest.approx(launched[name], rel=0.05, abs=1e-3, nan_ok=True)
            assert recorded[name] == near, name


@SCHEME
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, scheme):
    """Within rounding: sums on a GPU are not repeated bit by bit."""
    opt = option_file(tmp_path, scheme=scheme, steps=12, save_every=6)
    train_tiny(opt)
    whole = torch.load(tmp_path / "run/last.pth", weights_only=True)
    (tmp_path / "run/previous.pth").rename(tmp_path / "run/last.pth")               # of step 6
    train_tiny(opt, "--resume")
    resumed = torch.load(tmp_path / "run/last.pth", weights_only=True)
    for name, weight in whole["net"].items():
        torch.testing.assert_close(weight, resumed["net"][name], rtol=1e-2, atol=1e-3, msg=name)


@OPTIMIZER
def test_no_step_along_a_gradient_that_is_not_finite(optimizer):
    layer, x = torch.nn.Linear(3, 2).cuda(), torch.rand(4, 3, device="cuda")
    side = make_side(optimizer, layer.parameters(), 0.1)
    for factor in (1.0, math.nan, 1.0):
        before = layer.weight.detach().clone()
        norm = take_step(side, layer(x).square().sum() * factor)
        assert norm.isfinite() == (factor == 1) and torch.equal(layer.weight, before) == (factor != 1)


@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-4), ("bfloat16", 3e-2)])
def test_strips_equal_the_whole_image(precision, tolerance):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    net = BaryIR(**SMALL).eval().cuda().to(memory_format=torch.channels_last)
    image = torch.rand(1, 3, 120, 92, device="cuda")
    whole = restore(net, image, 0, "float32")
    for rows in (0, 1, 16):
        strips = restore(net, image, rows, precision)
        torch.testing.assert_close(strips, whole, rtol=tolerance, atol=tolerance)
