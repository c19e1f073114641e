"""What b and r carry: the table of benchmarks.contributions against the stages called by hand."""

import pytest
import torch

from conftest import output_of, read_csv, write_yaml
from data.datasets import BUNDLED
from utils.checkpoint import load_network
from utils.images import read_image, to_tensor
from utils.metrics import Metrics, crop_for


def test_table(tmp_path, checkpoint):
    image = "microaneurysms.png"                                # of scikit-image, 102x102
    opt = write_yaml(tmp_path / "small.yml", {"name": "small", "checkpoint": str(checkpoint), "sets": [
        {"name": "jpeg", "bundled": [image], "degradation": "jpeg", "levels": [20]}]})
    output_of("benchmarks/contributions.py", "--opt", opt, "--out", tmp_path / "out.csv")
    row, = read_csv(tmp_path / "out.csv")
    clean = crop_for("promptir", read_image(BUNDLED / image))
    strip, net, psnr = read_image(tmp_path / "out/jpeg" / image), load_network(checkpoint), Metrics(["psnr"])
    with torch.no_grad():
        z, skips = net.encode(to_tensor(strip[:, :96])[None])   # the input; five panels follow
        b = net.transport(z)
        for side, latents in {"r = 0": (b, 0 * z), "b = 0": (0 * z, z - b), "both": (b, z - b)}.items():
            restored = net.decode(*latents, skips)[0].permute(1, 2, 0).numpy()
            score = psnr.of_image("promptir", restored, clean / 255)["psnr"]
            assert float(row[side]) == pytest.approx(score, abs=1e-3)
    assert strip.shape == (96, 6 * 96, 3) and len({row[side] for side in ("r = 0", "b = 0", "both")}) == 3
