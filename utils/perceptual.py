"""LPIPS and FID, by the packages lpips and torch-fidelity: optional, imported here when a test option file asks for them.

Nothing is downloaded: the weights that the packages would fetch are looked for where torch.hub keeps them.
"""

import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from utils.errors import InputError

ALEXNET = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
LPIPS_SMALLEST = 32        # pixels: AlexNet's strides leave nothing of less
INCEPTION = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"


def load_lpips(device: torch.device | str) -> Callable[[np.ndarray, np.ndarray], float]:
    """LPIPS (Zhang et al., CVPR 2018; AlexNet, version 0.1) of two images, [H,W,3] in [0, 1]; the network gets [-1, 1]."""
    lpips = _package("lpips", "lpips")
    weights = _weights(ALEXNET, "lpips: the weights of AlexNet")
    with warnings.catch_warnings(action="ignore"):                          # of torchvision, about the package's way to call it
        net = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)        # linear layers from the package, AlexNet at random
    layers = {name.split(".", 1)[1]: name for name in net.net.state_dict()}     # 3.weight -> slice2.3.weight
    trunk = {layers[name.removeprefix("features.")]: tensor for name, tensor in weights.items() if name.startswith("features.")}
    net.net.load_state_dict(trunk)
    net = net.to(device).eval()

    @torch.inference_mode()
    def distance(image: np.ndarray, clean: np.ndarray) -> float:
        return net(*(2 * _batch(x).float().to(device) - 1 for x in (image, clean))).item()

    return distance


def load_inception(device: torch.device | str) -> Callable[[np.ndarray], np.ndarray]:
    """The features that FID compares: [H,W,3] uint8 -> [2048], of the Inception network that TensorFlow's FID uses."""
    extractors = _package("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity")
    _weights(INCEPTION, "fid: the weights of Inception")                    # read once in safety: the package unpickles them
    net = extractors.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(_path(INCEPTION)))
    net = net.to(device).eval()

    @torch.inference_mode()
    def features(image: np.ndarray) -> np.ndarray:
        return net(_batch(image).to(device))[0][0].double().cpu().numpy()

    return features


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """FID (Heusel et al., NeurIPS 2017) between features [N,D] and [M,D]: the Frechet distance of Gaussians fitted to them.

    Biased upward for few images: comparable only between sets of the same number. InputError for fewer than two.
    """
    if min(len(a), len(b)) < 2:
        raise InputError(f"fid: {min(len(a), len(b))} image in a set, expected at least 2: a covariance is estimated")
    fid = _package("torch_fidelity.metric_fid", "torch-fidelity")
    statistics = [fid.fid_features_to_statistics(torch.from_numpy(features)) for features in (a, b)]
    return fid.fid_statistics_to_metric(*statistics, verbose=False)[fid.KEY_METRIC_FID]


def _batch(image: np.ndarray) -> Tensor:
    """[H,W,3] -> [1,3,H,W]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]


def _package(module: str, package: str) -> ModuleType:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        needs = "" if missing == module.partition(".")[0] else f" with {missing}, which it needs"
        raise InputError(f"metrics: {package} is not installed{needs}, expected after: pip install {package} {missing if needs else ''}".rstrip()) from None
    except Exception as error:                                              # a torchvision that does not fit torch, say
        raise InputError(f"metrics: {package} cannot be imported ({type(error).__name__}: {' '.join(str(error).split())})") from None


def _path(url: str) -> Path:
    return Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])


def _weights(url: str, what: str) -> dict[str, Tensor]:
    """The state dict that torch.hub would have downloaded from a URL."""
    path = _path(url)
    if not path.is_file():
        raise InputError(f"{what} are not at {path}, expected the file from {url}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                              # broken files raise nearly anything
        raise InputError(f"{what}: {path} cannot be read ({type(error).__name__}), expected the file from {url}") from None
