"""LPIPS: what the network gets, what is said where the package is absent. A small network stands in."""

import importlib.util
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from utils.errors import InputError
from utils.metrics import Metrics


class SmallLPIPS(nn.Module):
    """As lpips.LPIPS: distance of two images in [-1, 1], [1,3,H,W] float32."""

    def __init__(self, net: str, verbose: bool) -> None:
        super().__init__()
        assert net == "alex"

    def forward(self, a, b):
        assert a.shape == b.shape == (1, 3, 40, 36) and a.dtype == b.dtype == torch.float32
        for image in (a, b):
            assert -1 <= image.min() < -0.5 and 0.5 < image.max() <= 1
        return (a - b).square().mean(dim=(1, 2, 3), keepdim=True)


@pytest.mark.parametrize("protocol", ["promptir", "full"])
def test_lpips_sees_images_in_minus_one_to_one(monkeypatch, protocol):
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=SmallLPIPS))
    image, clean = np.random.default_rng(0).random((2, 40, 36, 3), dtype=np.float32)
    metrics = Metrics(["psnr", "lpips"])
    scores = metrics.of_image(protocol, image, clean)
    assert scores["lpips"] == pytest.approx(4 * np.square(image - clean).mean(), rel=2e-2)  # full: 8 bit
    assert list(scores) == ["psnr", "lpips"] and metrics.smallest == 32


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(InputError, match=r"lpips cannot be loaded .*pip install lpips"):
        Metrics(["lpips"])


@pytest.mark.skipif(not importlib.util.find_spec("lpips"), reason="needs the package lpips and AlexNet")
def test_the_package_itself():
    try:
        metrics = Metrics(["lpips"])
    except InputError:
        pytest.skip("AlexNet's weights are not here")
    clean = np.random.default_rng(0).random((64, 64, 3), dtype=np.float32)
    assert metrics.of_image("promptir", clean, clean)["lpips"] == 0
    assert metrics.of_image("promptir", 1 - clean, clean)["lpips"] > 0.1
