"""What b and r carry: table and strips of benchmarks.contributions against the stages called by hand."""

import numpy as np
import pytest
import torch

from conftest import output_of, read_csv, write_yaml
from data.datasets import bundled_folder
from utils.checkpoint import load_network
from utils.images import read_image
from utils.metrics import crop_for, psnr

IMAGE = "microaneurysms.png"            # of scikit-image, 102x102


def test_table_and_strips(tmp_path, checkpoint):
    content = {"name": "small", "checkpoint": str(checkpoint), "protocol": "promptir",
               "sets": [{"name": "jpeg", "bundled": [IMAGE], "degradation": "jpeg", "levels": [20]},
                        {"name": "as_it_is", "bundled": [IMAGE]}]}
    output_of("benchmarks/contributions.py", "--opt", write_yaml(tmp_path / "small.yml", content),
              "--out", tmp_path / "out.csv")
    jpeg, as_it_is = read_csv(tmp_path / "out.csv")
    clean = crop_for("promptir", read_image(bundled_folder() / IMAGE))
    strip = read_image(tmp_path / "out/jpeg" / IMAGE)
    assert strip.shape == (96, 6 * 96, 3)
    degraded, *panels = np.split(strip, 6, axis=1)

    net = load_network(checkpoint)
    with torch.no_grad():
        z, skips = net.encode(torch.from_numpy(degraded.transpose(2, 0, 1)[None] / np.float32(255)))
        b = net.transport(z)
        r, none = z - b, torch.zeros_like(b)
        restored = {side: net.decode(*latents, skips)[0].permute(1, 2, 0).numpy() for side, latents in
                    {"r = 0": (b, none), "b = 0": (none, r), "both": (b, r)}.items()}
    differences = [0.5 + (restored["both"] - restored[side]) / 2 for side in ("b = 0", "r = 0")]
    for panel, expected in zip(panels, [*restored.values(), *differences], strict=True):
        np.testing.assert_allclose(panel / 255, expected.clip(0, 1), atol=0.51 / 255)
    for side, panel in zip(restored, panels, strict=False):
        assert float(jpeg[side]) == pytest.approx(psnr(panel, clean, 255), abs=0.01)
    assert len({jpeg[side] for side in restored}) == 3          # both latents count in a random network
    assert as_it_is["both"] == "" and (tmp_path / "out/as_it_is" / IMAGE).is_file()     # no ground truth
