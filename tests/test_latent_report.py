"""The latent report: its distance and its probe on what is known, and the whole on small images."""

import math

import pytest
import torch

from benchmarks.gaussians import distances, moments
from benchmarks.latent_report import apart, contrastive_of_others, probe_accuracy, retrieval, within
from conftest import output_of, read_csv, run_script, write_image, write_yaml
from losses.residual import contrastive


def test_distances_between_and_within_sources():
    sources = [torch.randn(40, 50, 4) + shift for shift in (0.0, 0.0, 3.0)]
    between = distances(sources)                                # pairs 0-1, 0-2, 1-2
    assert between[0] < 0.1 and max(within(sources, [torch.arange(40)] * 3)) < 0.1
    assert between[1:] == pytest.approx([4 * 9] * 2, rel=0.05)
    variance = moments(torch.cat(sources))[1].trace()           # 1 within, and 2 of 9 squared shifts between
    assert float(variance) == pytest.approx(4 * (1 + 2 / 9 * 3**2), rel=0.05)


def test_probe_accuracy_matched_scenes_and_the_contrastive_term():
    source, fold = torch.arange(3).repeat_interleave(60), torch.arange(180) % 5
    features = torch.randn(180, 8)
    assert probe_accuracy(features, source, fold) < 0.5             # nothing to find: chance is 1/3
    features[:, 2] += 8 * source
    assert probe_accuracy(features, source, fold) > 0.95
    scenes, *others = torch.randn(3, 30, 64)
    shared = [scenes + 0.01 * torch.randn(30, 64) for _ in range(3)]
    assert retrieval(shared) == 1 and apart(shared) == pytest.approx(0.01 * (2 * 64) ** 0.5, rel=0.05)
    assert retrieval([scenes, *others]) < 0.2
    # Orthogonal residuals know nothing of their source: L_ctr is 0 with j = i, log of the sources without.
    r, source = torch.eye(60), torch.arange(3).repeat_interleave(20)
    assert float(contrastive(r, source).mean()) < 1e-4
    assert float(contrastive_of_others(r, source).mean()) == pytest.approx(math.log(59 / 19))
    clustered = torch.eye(3).repeat_interleave(20, dim=0)
    assert float(contrastive_of_others(clustered, source).mean()) < 1e-4


def test_report(tmp_path, checkpoint):
    """Sources that differ in their noise alone differ in each latent, and not in z of the clean patches."""
    for n in range(6):
        write_image(tmp_path / f"images/{n}.png", 40, 32, seed=n)
    sets = [{"name": name, "clean": "images", "degradation": "noise", "levels": [level]}
            for name, level in (("a", 10), ("b", 10), ("c", 80))]
    opt = write_yaml(tmp_path / "some.yml", {"name": "some", "checkpoint": str(checkpoint),
                                             "root": str(tmp_path), "sets": sets})
    out = tmp_path / "out/report.csv"
    arguments = ["benchmarks/latent_report.py", "--opt", opt, "--patches", 12, "--size", 24, "--out", out]
    assert "chance 0.333" in output_of(*arguments)
    rows = {row.pop("quantity"): row for row in read_csv(out)}
    for space, value in rows["distance between sources"].items():
        assert abs(float(value)) < 1e-6 if space == "clean" else float(value) > 1e-4
        assert 0 <= float(rows["probe accuracy"][space]) <= 1
    assert float(rows["same scene"]["clean"]) == 0 and float(rows["retrieval"]["clean"]) == 1
    assert float(rows["variance"]["z"]) == float(rows["same scene"]["z"]) == 1
    assert 0 < float(rows["L_ctr"]["r"]) < float(rows["L_ctr without j = i"]["r"])
    for changes, message in ((["sets.0.limit=3"], "sets of [3, 6, 6] images and --patches 12"),
                             (["sets.0.limit=5"], "expected sets of the same clean photographs")):
        result = run_script(*arguments, "--set", *changes)
        assert result.returncode == 1 and message in result.stderr
