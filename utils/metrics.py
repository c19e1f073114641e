"""PSNR and SSIM as the field computes them: RGB or Y, by scikit-image, under one of three protocols.

LPIPS compares the same crops and values in [-1, 1], by the package lpips: optional, imported when an option
file asks for it. The authors' tester feeds it [0, 1], which gives 2 to 12 times less.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from utils.errors import InputError, one_line
from utils.images import to_uint8

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
    """The metrics that an option file names; InputError where the package lpips or its weights are absent."""

    def __init__(self, names: Sequence[str] = ("psnr", "ssim"), device: torch.device | str = "cpu") -> None:
        self.names = tuple(names)
        self.smallest = max(SMALLEST.get(name, 1) for name in names)            # side in pixels
        self.by_name = {"psnr": psnr, "ssim": ssim, "psnr_y": on_luma(psnr), "ssim_y": on_luma(ssim),
                        "psnr_gtmean": psnr_gtmean}
        if "lpips" in names:
            self.by_name["lpips"] = load_lpips(device)

    def of_image(self, protocol: str, image: np.ndarray, clean: np.ndarray) -> dict[str, float]:
        """The metrics of one image against the ground truth, both [H,W,3] floats in [0, 1] (clipped here)."""
        (image, data_range), (clean, _) = values_for(protocol, image), values_for(protocol, clean)
        return {name: self.by_name[name](image, clean, data_range) for name in self.names}


def means(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over images or sets that all have the same; empty without any."""
    return {name: float(np.mean([score[name] for score in scores])) for name in (scores[0] if scores else ())}


def load_lpips(device: torch.device | str) -> Callable[..., float]:
    """LPIPS (Zhang et al., CVPR 2018; AlexNet, version 0.1) of [H,W,3] in [0, data_range] each."""
    try:
        import lpips

        net = lpips.LPIPS(net="alex", verbose=False).to(device).eval()         # fetches AlexNet's weights
    except Exception as error:                                  # no package, no network, a broken download
        raise InputError(f"metrics: lpips cannot be loaded ({one_line(error)}), "
                         "expected after: pip install lpips") from None

    @torch.inference_mode()
    def distance(image: np.ndarray, clean: np.ndarray, data_range: int = 1) -> float:
        pair = (torch.from_numpy(x / data_range).permute(2, 0, 1)[None].float() for x in (image, clean))
        return net(*(2 * x.to(device) - 1 for x in pair)).item()

    return distance
