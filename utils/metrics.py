"""PSNR and SSIM as the field computes them: RGB, by scikit-image, under the protocols of METHOD section 5.

LPIPS and FID (utils/perceptual.py) compare the same crops and values.
"""

from collections.abc import Sequence

import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from utils.images import to_uint8
from utils.perceptual import LPIPS_SMALLEST, frechet_distance, load_inception, load_lpips

SSIM_WINDOW = 7        # pixels, scikit-image's default: the field's uniform window


def crop_for(protocol: str, image: np.ndarray) -> np.ndarray:
    """The part of [H,W,3] that a protocol measures.

    promptir: centre crop to multiples of 16; baryir: right and bottom cropped to multiples of 8; full: everything.
    """
    height, width = image.shape[:2]
    if protocol == "promptir":
        top, left = height % 16 // 2, width % 16 // 2
        return image[top:top + height // 16 * 16, left:left + width // 16 * 16]
    if protocol == "baryir":
        return image[:height // 8 * 8, :width // 8 * 8]
    return image


def values_for(protocol: str, image: np.ndarray) -> tuple[np.ndarray, int]:
    """What a protocol compares of an image [H,W,3] in [0, 1], and its data range: floats and 1, or 8 bit and 255."""
    return (image.clip(0, 1), 1) if protocol == "promptir" else (to_uint8(image), 255)


def psnr(protocol: str, image: np.ndarray, clean: np.ndarray) -> float:
    """PSNR in dB of an image against the ground truth, both [H,W,3] floats in [0, 1] (clipped here); inf where equal."""
    (image, data_range), (clean, _) = values_for(protocol, image), values_for(protocol, clean)
    return np.inf if np.array_equal(image, clean) else float(peak_signal_noise_ratio(clean, image, data_range=data_range))


def ssim(protocol: str, image: np.ndarray, clean: np.ndarray) -> float:
    """SSIM of an image against the ground truth, both [H,W,3] floats in [0, 1] (clipped here)."""
    (image, data_range), (clean, _) = values_for(protocol, image), values_for(protocol, clean)
    return float(structural_similarity(clean, image, win_size=SSIM_WINDOW, data_range=data_range, channel_axis=2))


class Metrics:
    """The metrics that an option file names, psnr, ssim, lpips or fid; InputError where a package or its weights are absent."""

    def __init__(self, names: Sequence[str] = ("psnr", "ssim"), device: torch.device | str = "cpu") -> None:
        self.names = tuple(names)
        self.smallest = max({"ssim": SSIM_WINDOW, "lpips": LPIPS_SMALLEST}.get(name, 1) for name in names)      # side in pixels
        self.lpips = load_lpips(device) if "lpips" in names else None
        self.inception = load_inception(device) if "fid" in names else None

    def of_image(self, protocol: str, image: np.ndarray, clean: np.ndarray) -> dict[str, float]:
        """The metrics of one image against the ground truth, both [H,W,3] floats in [0, 1]."""
        def lpips() -> float:
            a, b = (values / data_range for values, data_range in (values_for(protocol, image), values_for(protocol, clean)))
            return self.lpips(a, b)

        compute = {"psnr": lambda: psnr(protocol, image, clean), "ssim": lambda: ssim(protocol, image, clean), "lpips": lpips}
        return {name: compute[name]() for name in self.names if name in compute}

    def features(self, *images: np.ndarray) -> list[np.ndarray]:
        """What fid needs of images, [H,W,3] floats in [0, 1], rounded to 8 bit: Inception features [2048] each."""
        return [self.inception(to_uint8(image)) for image in images] if self.inception else []

    def of_set(self, scores: Sequence[dict[str, float]], features: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
        """A set's metrics: means over its images, and FID between the features of the images and of their ground truths."""
        if not scores:
            return {}
        means = {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}
        if self.inception:
            means["fid"] = frechet_distance(*(np.stack(side) for side in zip(*features)))
        return {name: means[name] for name in self.names}
