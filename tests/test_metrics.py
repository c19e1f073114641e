"""PSNR, SSIM and LPIPS against their definitions and packages."""

import sys
import types

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch import nn

from utils.errors import InputError
from utils.metrics import Metrics


@pytest.mark.parametrize("protocol", ["promptir", "full"])
def test_metrics_of_luma_and_of_equal_images(protocol):
    metrics = Metrics(["psnr_y", "ssim_y"])
    image, clean = np.random.default_rng(0).integers(0, 256, (2, 20, 24, 3)) / 255
    y, y_clean = ((65.481 * r + 128.553 * g + 24.966 * b + 16) / 255
                  for r, g, b in (x.transpose(2, 0, 1) for x in (image, clean)))
    assert metrics.of_image(protocol, image, clean) == pytest.approx({
        "psnr_y": -10 * np.log10(np.square(y - y_clean).mean()),
        "ssim_y": structural_similarity(y_clean, y, data_range=1)})
    # A closed form: Y of grey v is (219 v + 16) / 255.
    flat = metrics.of_image(protocol, np.full((8, 8, 3), 0.4), np.full((8, 8, 3), 0.6))
    assert flat["psnr_y"] == pytest.approx(-20 * np.log10(219 * 0.2 / 255))
    assert Metrics().of_image(protocol, image, image) == {"psnr": np.inf, "ssim": 1.0}


class SmallLPIPS(nn.Module):
    """As lpips.LPIPS, as far as it is called: a distance of [1,3,H,W] in [0, 1] each."""

    def __init__(self, net: str, verbose: bool) -> None:
        super().__init__()
        assert net == "alex"

    def forward(self, a: torch.Tensor, b: torch.Tensor, normalize: bool) -> torch.Tensor:
        assert normalize and a.shape == b.shape == (1, 3, 32, 48) and a.dtype == b.dtype == torch.float32
        return (a - b).square().mean(dim=(1, 2, 3), keepdim=True) + a[:, :1, :1, :1]


def test_lpips_gets_both_images_and_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=SmallLPIPS))
    metrics = Metrics(["lpips", "psnr"])
    image, clean = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3)) / 255
    found = metrics.of_image("full", image, clean)
    assert found["lpips"] == pytest.approx(np.square(image - clean).mean() + image[0, 0, 0], rel=1e-5)
    assert list(found) == ["lpips", "psnr"] and metrics.smallest("full") == 32
    monkeypatch.setitem(sys.modules, "lpips", None)             # import fails as for an absent package
    with pytest.raises(InputError, match="metrics: lpips is not installed .*, expected after: pip install l"):
        Metrics(["psnr", "lpips"])
