"""The latent report: its distance and its probe on what is known, and the whole on small images."""

import csv

import pytest
import torch
import yaml

from benchmarks.gaussians import distances, moments, squared_bures_wasserstein
from benchmarks.latent_report import apart, probe_accuracy, retrieval, within
from conftest import run_script, write_image


def test_bures_wasserstein_of_commuting_gaussians():
    """Covariances of one basis: |m_a - m_b|^2 + sum_i (sqrt a_i - sqrt b_i)^2."""
    noise = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.qr(noise)[0]
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 1.0, 0.25]).double()
    means = torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.0, 0.0]]).double()
    distance = squared_bures_wasserstein(means[0], (basis * a) @ basis.T, means[1], (basis * b) @ basis.T)
    assert float(distance) == pytest.approx(5 + 1 + 1 + 2.5**2)


def test_distances_between_and_within_sources():
    generator = torch.Generator().manual_seed(0)
    sources = [torch.randn(40, 50, 4, generator=generator) + shift for shift in (0.0, 0.0, 3.0)]
    between = distances(sources)                                # pairs 0-1, 0-2, 1-2
    assert between[0] < 0.1 and max(within(sources, [torch.arange(40)] * 3)) < 0.1
    assert between[1:] == pytest.approx([4 * 9] * 2, rel=0.05)
    variance = moments(torch.cat(sources))[1].trace()           # 1 within, and 2 of 9 squared shifts between
    assert float(variance) == pytest.approx(4 * (1 + 2 / 9 * 3**2), rel=0.05)


def test_probe_accuracy():
    generator = torch.Generator().manual_seed(0)
    source, fold = torch.arange(3).repeat_interleave(60), torch.arange(180) % 5
    features = torch.randn(180, 8, generator=generator)
    assert probe_accuracy(features, source, fold) < 0.5             # nothing to find: chance is 1/3
    features[:, 2] += 8 * source
    assert probe_accuracy(features, source, fold) > 0.95


def test_matched_scenes():
    generator = torch.Generator().manual_seed(0)
    scenes = torch.randn(30, 64, generator=generator)
    shared = [scenes + 0.01 * torch.randn(30, 64, generator=generator) for _ in range(3)]
    assert retrieval(shared) == 1 and apart(shared) == pytest.approx(0.01 * (2 * 64) ** 0.5, rel=0.05)
    assert retrieval([torch.randn(30, 64, generator=generator) for _ in range(3)]) < 0.2


def test_report(tmp_path, checkpoint):
    """Sources that differ in their noise alone differ in each latent, and not in z of the clean patches."""
    for n in range(6):
        write_image(tmp_path / f"images/{n}.png", 40, 32, seed=n)
    sets = [{"name": name, "clean": "images", "degradation": "noise", "levels": [level]}
            for name, level in (("a", 10), ("b", 10), ("c", 80))]
    opt = tmp_path / "some.yml"
    opt.write_text(yaml.safe_dump({"name": "some", "checkpoint": "none.pth", "root": str(tmp_path),
                                   "sets": sets}))
    out = tmp_path / "out/report.csv"
    arguments = ["benchmarks/latent_report.py", "--opt", opt, "--set", f"checkpoint={checkpoint}",
                 "--patches", 12, "--size", 24, "--out", out]
    result = run_script(*arguments)
    assert result.returncode == 0 and "chance 0.333" in result.stdout, result.stderr
    rows = {row.pop("quantity"): row for row in csv.DictReader(out.read_text().splitlines())}
    for space, value in rows["distance between sources"].items():
        assert abs(float(value)) < 1e-6 if space == "clean" else float(value) > 1e-4
        assert 0 <= float(rows["probe accuracy"][space]) <= 1
    assert float(rows["same scene"]["clean"]) == 0 and float(rows["retrieval"]["clean"]) == 1
    assert float(rows["variance"]["z"]) == float(rows["same scene"]["z"]) == 1

    for changes, message in ((["--set", "sets.0.limit=3"], "sets of [3, 6, 6] images and --patches 12"),
                             (["--set", "sets.0.limit=5"], "expected sets of the same clean photographs"),
                             (["--set", "sets.0.clean=", "sets.0.degradation=", "sets.0.levels=[]",
                               "sets.0.degraded=images"], "expected sets of the same clean photographs")):
        result = run_script(*arguments, *changes)
        assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr
