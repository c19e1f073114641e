"""PSNR and SSIM as the field computes them: RGB or Y, by scikit-image, under one of three protocols.

LPIPS and FID compare the same crops and values, by the packages lpips and torch-fidelity: optional, imported
when an option file asks for them. Nothing is downloaded: the weights that the packages would fetch are looked
for where torch.hub keeps them.
"""

import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from utils.errors import InputError, one_line
from utils.images import to_uint8

ALEXNET = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
INCEPTION = ("https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
             "weights-inception-2015-12-05-6726825d.pth")
SMALLEST = {"ssim": 7, "ssim_y": 7, "lpips": 32}    # pixels: the field's uniform window; AlexNet's strides


def crop_for(protocol: str, image: np.ndarray) -> np.ndarray:
    """The part of [H,W,3] that a protocol measures.

    promptir: centre crop to multiples of 16; baryir: top left crop to multiples of 8; full: everything.
    """
    height, width = image.shape[:2]
    if protocol == "promptir":
        top, left = height % 16 // 2, width % 16 // 2
        return image[top:top + height // 16 * 16, left:left + width // 16 * 16]
    if protocol == "baryir":
        return image[:height // 8 * 8, :width // 8 * 8]
    return image


def values_for(protocol: str, image: np.ndarray) -> tuple[np.ndarray, int]:
    """What a protocol compares of an image [H,W,3] in [0, 1] and its data range: floats, 1, or 8 bit, 255."""
    return (image.clip(0, 1), 1) if protocol == "promptir" else (to_uint8(image), 255)


def psnr(image: np.ndarray, clean: np.ndarray, data_range: int) -> float:
    """PSNR in dB against the ground truth, [H,W,3] each; inf where they are equal."""
    if np.array_equal(image, clean):
        return np.inf
    return float(peak_signal_noise_ratio(clean, image, data_range=data_range))


def ssim(image: np.ndarray, clean: np.ndarray, data_range: int) -> float:
    """SSIM against the ground truth, [H,W,3] each."""
    return float(structural_similarity(clean, image, win_size=SMALLEST["ssim"], data_range=data_range,
                                       channel_axis=2))


def luma(image: np.ndarray, data_range: int) -> np.ndarray:
    """Y of ITU-R BT.601, as the field has it: [H,W,3] in [0, data_range] -> [H,W,1] in [16, 235] / 255."""
    return (image @ np.array([65.481, 128.553, 24.966]) / data_range + 16)[..., None] / 255


def psnr_gtmean(image: np.ndarray, clean: np.ndarray, data_range: int) -> float:
    """PSNR in dB of an image scaled to the ground truth's mean grey (LLFlow, Retinexformer: low light)."""
    grey, wanted = ((x @ np.array([0.299, 0.587, 0.114])).mean() for x in (image, clean))
    return psnr((image * (wanted / max(grey, 1e-8))).clip(0, data_range), clean, data_range)


def on_luma(metric: Callable[..., float]) -> Callable[..., float]:
    return lambda image, clean, data_range: metric(luma(image, data_range), luma(clean, data_range), 1)


class Metrics:
    """The metrics that an option file names; InputError where a package or its weights are absent."""

    def __init__(self, names: Sequence[str] = ("psnr", "ssim"), device: torch.device | str = "cpu") -> None:
        self.names = tuple(names)
        self.smallest = max(SMALLEST.get(name, 1) for name in names)            # side in pixels
        self.per_image = {"psnr": psnr, "ssim": ssim, "psnr_y": on_luma(psnr), "ssim_y": on_luma(ssim),
                          "psnr_gtmean": psnr_gtmean}
        if "lpips" in names:
            self.per_image["lpips"] = load_lpips(device)
        self.inception = load_inception(device) if "fid" in names else None

    def of_image(self, protocol: str, image: np.ndarray, clean: np.ndarray) -> dict[str, float]:
        """The metrics of one image against the ground truth, both [H,W,3] floats in [0, 1] (clipped here)."""
        (image, data_range), (clean, _) = values_for(protocol, image), values_for(protocol, clean)
        return {name: self.per_image[name](image, clean, data_range)
                for name in self.names if name in self.per_image}

    def features(self, *images: np.ndarray) -> list[np.ndarray]:
        """What fid needs of images, [H,W,3] in [0, 1], rounded to 8 bit: Inception features [2048] each."""
        return [self.inception(to_uint8(image)) for image in images] if self.inception else []

    def of_set(self, scores: Sequence[dict[str, float]], features: Sequence[np.ndarray],
               clean: Sequence[np.ndarray]) -> dict[str, float]:
        """A set's metrics: means over its images, and FID between features of images and ground truths."""
        found = means(scores)
        if self.inception and scores:
            found["fid"] = frechet_distance(np.stack(features), np.stack(clean))
        return {name: found[name] for name in self.names if name in found}


def means(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over images or sets that all have the same; empty without any."""
    return {name: float(np.mean([score[name] for score in scores])) for name in (scores[0] if scores else ())}


def load_lpips(device: torch.device | str) -> Callable[..., float]:
    """LPIPS (Zhang et al., CVPR 2018; AlexNet, version 0.1) of [H,W,3] in [0, data_range] each."""
    lpips = _package("lpips", "lpips")
    _, weights = _weights(ALEXNET, "lpips: the weights of AlexNet")
    with warnings.catch_warnings(action="ignore"):              # of torchvision, about how it is called
        net = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)    # its linear layers, AlexNet random
    trunk = [tensor for name, tensor in weights.items() if name.startswith("features.")]
    net.net.load_state_dict(dict(zip(net.net.state_dict(), trunk, strict=True)))
    net = net.to(device).eval()

    @torch.inference_mode()
    def distance(image: np.ndarray, clean: np.ndarray, data_range: int = 1) -> float:
        return net(*(2 * _batch(x / data_range).float().to(device) - 1 for x in (image, clean))).item()

    return distance


def load_inception(device: torch.device | str) -> Callable[[np.ndarray], np.ndarray]:
    """The features that FID compares: [H,W,3] uint8 -> [2048], of the Inception of TensorFlow's FID."""
    extractors = _package("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity")
    path, _ = _weights(INCEPTION, "fid: the weights of Inception")  # read safely first: the package unpickles
    net = extractors.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"],
                                                 feature_extractor_weights_path=str(path))
    net = net.to(device).eval()

    @torch.inference_mode()
    def features(image: np.ndarray) -> np.ndarray:
        return net(_batch(image).to(device))[0][0].double().cpu().numpy()

    return features


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """FID (Heusel et al., NeurIPS 2017) of features [N,D], [M,D]: Frechet distance of fitted Gaussians.

    Biased upward for few images: comparable only between sets of equal size. InputError for fewer than two.
    """
    if (count := min(len(a), len(b))) < 2:
        raise InputError(f"fid: {count} image in a set, expected at least 2: a covariance is estimated")
    fid = _package("torch_fidelity.metric_fid", "torch-fidelity")
    statistics = [fid.fid_features_to_statistics(torch.from_numpy(features)) for features in (a, b)]
    return fid.fid_statistics_to_metric(*statistics, verbose=False)[fid.KEY_METRIC_FID]


def _batch(image: np.ndarray) -> Tensor:
    """[H,W,3] -> [1,3,H,W]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]


def _package(module: str, package: str) -> ModuleType:
    try:
        return import_module(module)
    except Exception as error:                                  # a torchvision that does not fit torch, say
        raise InputError(f"metrics: {package} is not installed, expected after: pip install {package} "
                         f"({type(error).__name__}: {one_line(error)})") from None


def _weights(url: str, what: str) -> tuple[Path, dict[str, Tensor]]:
    """The file that torch.hub would have downloaded from a URL, and the state dict in it."""
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not path.is_file():
        raise InputError(f"{what} are not at {path}, expected the file from {url}")
    try:
        return path, torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                  # absent; broken files raise nearly anything
        raise InputError(f"{what}: {path} cannot be read ({type(error).__name__}), "
                         f"expected the file from {url}") from None
