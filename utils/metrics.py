"""PSNR, SSIM and LPIPS as the field computes them: on RGB or Y, under one of three protocols."""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from utils.errors import InputError
from utils.images import to_uint8

SMALLEST = {"ssim": 7, "ssim_y": 7, "lpips": 32}    # pixels: the field's uniform window; AlexNet's strides
MULTIPLES = {"promptir": 16, "baryir": 8, "full": 1}            # pixels, to which a protocol crops


def crop_for(protocol: str, image: np.ndarray) -> np.ndarray:
    """The part of [H,W,3] that a protocol measures: of MULTIPLES, promptir's at the centre, else top left."""
    over = [side % MULTIPLES[protocol] for side in image.shape[:2]]
    top, left = (side // 2 if protocol == "promptir" else 0 for side in over)
    return image[top:top + image.shape[0] - over[0], left:left + image.shape[1] - over[1]]


def too_small(shape: Sequence[int], smallest: int, offset: Sequence[int] = (0, 0)) -> str:
    """What is wrong with a shape [H,W,3] that, without `offset`, has less than so many pixels a side."""
    height, width = (side - cut for side, cut in zip(shape, offset, strict=False))
    return (f"{width}x{height} pixels, expected at least {smallest}x{smallest} to measure"
            if min(height, width) < smallest else "")


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


def on_luma(metric: Callable[..., float]) -> Callable[..., float]:
    return lambda image, clean, data_range: metric(luma(image, data_range), luma(clean, data_range), 1)


def lpips_on(device: torch.device | str) -> Callable[..., float]:
    """LPIPS (Zhang et al., CVPR 2018; AlexNet, version 0.1), which its package computes on a device.

    It sees [-1, 1]. The authors' tester feeds it [0, 1], which gives 2 to 12 times less.
    """
    try:
        from lpips import LPIPS
    except ImportError as error:
        raise InputError(f"metrics: lpips is not installed ({error}), "
                         "expected after: pip install lpips") from None
    with warnings.catch_warnings(action="ignore"):              # of torchvision, about how it is called
        net = LPIPS(net="alex", verbose=False).to(device).eval()        # downloads AlexNet's weights once

    @torch.inference_mode()
    def distance(image: np.ndarray, clean: np.ndarray, data_range: int) -> float:
        pair = np.stack([image, clean]).astype(np.float32).transpose(0, 3, 1, 2) / data_range
        return net(*torch.from_numpy(pair).to(device).split(1), normalize=True).item()

    return distance


class Metrics:
    """The metrics that an option file names; InputError where a package is absent."""

    def __init__(self, names: Sequence[str] = ("psnr", "ssim"), device: torch.device | str = "cpu") -> None:
        known = {"psnr": psnr, "ssim": ssim, "psnr_y": on_luma(psnr), "ssim_y": on_luma(ssim)}
        self.metrics = {name: known.get(name) or lpips_on(device) for name in names}
        self.window = max(SMALLEST.get(name, 1) for name in names)

    def smallest(self, protocol: str) -> int:
        """The side in pixels that an image needs at least to be measured under a protocol."""
        return -(-self.window // MULTIPLES[protocol]) * MULTIPLES[protocol]

    def of_image(self, protocol: str, image: np.ndarray, clean: np.ndarray) -> dict[str, float]:
        """The metrics of one image against the ground truth, both [H,W,3] floats in [0, 1] (clipped here)."""
        floats = protocol == "promptir"                         # the others compare 8 bit
        image, clean = (pixels.clip(0, 1) if floats else to_uint8(pixels) for pixels in (image, clean))
        return {name: metric(image, clean, 1 if floats else 255) for name, metric in self.metrics.items()}


def means(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over images or sets that all have the same; empty without any."""
    return {name: float(np.mean([score[name] for score in scores])) for name in (scores[0] if scores else ())}
