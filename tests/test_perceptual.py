"""LPIPS and FID: what the networks are given, what is made of their answers, and what is said where they are absent.

Small random networks stand in for the packages lpips and torch-fidelity; the last tests use the packages where installed.
"""

import csv
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from conftest import run_script, write_image
from test_evaluation import options, restored_by_hand
from utils import metrics
from utils.errors import InputError
from utils.images import read_image, to_uint8


class SmallLPIPS(nn.Module):
    """As lpips.LPIPS: layers named sliceN.M after AlexNet's features.M; distance of two images in [-1, 1]."""

    def __init__(self, net: str, pnet_rand: bool, verbose: bool) -> None:
        super().__init__()
        assert net == "alex" and pnet_rand
        self.net = nn.Module()
        self.net.slice1, self.net.slice2 = nn.Sequential(), nn.Sequential()
        self.net.slice1.add_module("0", nn.Conv2d(3, 4, 5))
        self.net.slice2.add_module("3", nn.Conv2d(4, 2, 3))

    def forward(self, a, b):
        assert a.shape == b.shape and a.dtype == b.dtype == torch.float32
        for image in (a, b):
            assert -1 <= image.min() < -0.5 and 0.5 < image.max() <= 1
        features = [self.net.slice2(torch.tanh(self.net.slice1(x))) for x in (a, b)]
        return (features[0] - features[1]).square().mean(dim=(1, 2, 3), keepdim=True)


class SmallInception(nn.Module):
    """As torch-fidelity's extractor: [B,3,H,W] uint8 -> a tuple of [B,features]."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str) -> None:
        super().__init__()
        assert features_list == ["2048"]
        self.mix = nn.Linear(3, 5)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))

    def forward(self, x):
        assert x.dtype == torch.uint8
        return (self.mix(x.float().std(dim=(2, 3))),)


@pytest.fixture
def packages(monkeypatch, tmp_path) -> dict[str, Path]:
    """Small stand-ins for both packages, and their weights where torch.hub would keep them."""
    folder = tmp_path / "torch/hub/checkpoints"
    folder.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    torch.manual_seed(0)
    paths = {"lpips": folder / "alexnet-owt-7be5be79.pth", "fid": folder / "weights-inception-2015-12-05-6726825d.pth"}
    torch.save({"features.0.weight": torch.randn(4, 3, 5, 5), "features.0.bias": torch.randn(4), "features.3.weight": torch.randn(2, 4, 3, 3),
                "features.3.bias": torch.randn(2), "classifier.1.weight": torch.randn(2, 2)}, paths["lpips"])
    torch.save({"mix.weight": torch.randn(5, 3), "mix.bias": torch.randn(5)}, paths["fid"])

    def statistics(features):
        return features.numpy().mean(0), np.cov(features.numpy(), rowvar=False)

    def metric(one, other, verbose):
        root = np.sqrt(np.linalg.eigvals(one[1] @ other[1]).astype(complex)).sum().real
        return {"fid": float(np.square(one[0] - other[0]).sum() + np.trace(one[1] + other[1]) - 2 * root)}

    modules = {
        "lpips": types.SimpleNamespace(LPIPS=SmallLPIPS), "torch_fidelity": types.ModuleType("torch_fidelity"),
        "torch_fidelity.feature_extractor_inceptionv3": types.SimpleNamespace(FeatureExtractorInceptionV3=SmallInception),
        "torch_fidelity.metric_fid": types.SimpleNamespace(fid_features_to_statistics=statistics, fid_statistics_to_metric=metric, KEY_METRIC_FID="fid"),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return paths


def test_table_with_all_metrics(tmp_path, checkpoint, packages):
    path = options(tmp_path, checkpoint, metrics=["psnr", "fid", "ssim", "lpips"])
    result = run_script("test.py", "--opt", path, "--protocol", "baryir")
    assert result.returncode == 0, result.stderr
    assert "input dB / FID / SSIM / LPIPS" in result.stdout
    with open(tmp_path / "results/table/table.csv", newline="") as file:
        row = next(csv.DictReader(file))
    assert list(row)[3:] == ["psnr_in", "fid_in", "ssim_in", "lpips_in", "psnr", "fid", "ssim", "lpips", "protocol", "checkpoint"]

    # By hand, from the 8-bit values that protocol baryir compares:
    trunk, mix = torch.load(packages["lpips"]), torch.load(packages["fid"])
    distances, features = [], {"in": [], "restored": [], "clean": []}
    for i in range(3):
        degraded, clean = (read_image(tmp_path / f"data/{kind}/{i}.png")[:32, :40] for kind in ("in", "clean"))
        images = {"in": degraded, "restored": to_uint8(restored_by_hand(checkpoint, degraded)), "clean": clean}
        answers = {}
        for name, image in images.items():
            x = torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32))[None]
            features[name].append((x.std(dim=(2, 3)) @ mix["mix.weight"].T + mix["mix.bias"])[0].double().numpy())
            x = torch.tanh(nn.functional.conv2d(2 * x / 255 - 1, trunk["features.0.weight"], trunk["features.0.bias"]))
            answers[name] = nn.functional.conv2d(x, trunk["features.3.weight"], trunk["features.3.bias"])
        distances.append([(answers[name] - answers["clean"]).square().mean().item() for name in ("in", "restored")])
    assert [float(row["lpips_in"]), float(row["lpips"])] == pytest.approx(np.mean(distances, axis=0), rel=1e-4)
    for column, name in (("fid_in", "in"), ("fid", "restored")):
        a, b = np.array(features[name]), np.array(features["clean"])
        root = np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T)).astype(complex) ** 0.5
        expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a.T)) + np.trace(np.cov(b.T)) - 2 * root.sum().real
        assert float(row[column]) == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("metric, package", [("lpips", "lpips"), ("fid", "torch-fidelity")])
def test_what_is_absent_is_said_before_any_image_is_restored(tmp_path, checkpoint, packages, monkeypatch, metric, package):
    def refusal() -> str:
        result = run_script("test.py", "--opt", options(tmp_path, checkpoint, metrics=["psnr", metric]))
        assert result.returncode == 1 and len(result.stderr.splitlines()) == 1 and not (tmp_path / "results").exists()
        return result.stderr

    packages[metric].write_bytes(b"broken")
    assert f"{packages[metric]} cannot be read" in refusal()
    packages[metric].unlink()
    assert f"{packages[metric]} cannot be read (FileNotFoundError), expected the file from https://" in refusal()
    for name in list(sys.modules):
        if name.partition(".")[0] == package.replace("-", "_"):
            monkeypatch.setitem(sys.modules, name, None)                            # import fails as for an absent package
    assert f"metrics: {package} is not installed, expected after: pip install {package}" in refusal()


def test_too_few_images_and_pixels_for_a_metric(tmp_path, checkpoint, packages):
    with pytest.raises(InputError, match="fid: 1 image in a set, expected at least 2"):
        metrics.frechet_distance(np.zeros((1, 5)), np.zeros((1, 5)))
    path = options(tmp_path, checkpoint, metrics=["fid"])
    result = run_script("test.py", "--opt", path, "--set", "sets.1.limit=1")
    assert result.returncode == 1 and "fid with one image in set noise, expected at least 2" in result.stderr and not (tmp_path / "results").exists()
    assert run_script("test.py", "--opt", path, "--set", "sets.2.limit=1").returncode == 0      # without ground truth there is no fid
    for name in ("in/a.png", "clean/a.png"):
        write_image(tmp_path / "data/small" / name, 31, 40)
    small = [{"name": "small", "degraded": "small/in", "clean": "small/clean"}]
    result = run_script("test.py", "--opt", options(tmp_path, checkpoint, metrics=["lpips"], sets=small), "--protocol", "full")
    assert result.returncode == 1 and "a.png: 31x40 pixels" in result.stderr and "too few to measure lpips, expected at least 32x32" in result.stderr


# With the packages themselves, where they are installed: their networks, at random.

@pytest.fixture
def hub(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    return tmp_path / "hub/checkpoints"


def test_package_lpips(hub):
    lpips = pytest.importorskip("lpips", reason="optional package")
    import torchvision

    torch.manual_seed(0)
    alexnet = torchvision.models.alexnet(weights=None)
    torch.save(alexnet.state_dict(), hub / "alexnet-owt-7be5be79.pth")
    ours = metrics.load_lpips("cpu")
    theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    for name in ("slice1", "slice2", "slice3", "slice4", "slice5"):
        for index, layer in getattr(theirs.net, name).named_children():
            layer.load_state_dict(alexnet.features[int(index)].state_dict())
    a, b = np.random.default_rng(0).random((2, 64, 80, 3))
    tensors = [torch.from_numpy(x.transpose(2, 0, 1)[None]).float() for x in (a, b)]
    assert ours(a, b) == pytest.approx(theirs(*tensors, normalize=True).item(), rel=1e-5) and ours(a, a) == 0


def test_package_torch_fidelity(hub):
    extractors = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="optional package")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:                                     # build it without its weights
        patch.setattr(extractors.FeatureExtractorInceptionV3, "load_state_dict", lambda self, weights: None)
        patch.setattr(extractors.torch, "load", lambda *_, **__: {})
        net = extractors.FeatureExtractorInceptionV3("random", ["2048"], "nowhere")
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)                                   # else the features vanish
    torch.save(net.state_dict(), hub / "weights-inception-2015-12-05-6726825d.pth")
    features = metrics.load_inception("cpu")
    images = np.random.default_rng(0).integers(0, 256, (6, 40, 50, 3), dtype=np.uint8)
    a = np.stack([features(image) for image in images[:3]])
    b = np.stack([features(image // 4) for image in images[3:]])
    assert a.shape == (3, 2048)
    distance = metrics.frechet_distance(a, b)
    assert distance > 0 and abs(metrics.frechet_distance(a, a)) < 1e-3 * distance
