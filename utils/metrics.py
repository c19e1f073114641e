"""PSNR and SSIM as the field computes them: RGB, by scikit-image, under the protocols of METHOD section 5."""

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from utils.images import to_uint8

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


def measure(protocol: str, image: np.ndarray, clean: np.ndarray) -> tuple[float, float]:
    """PSNR in dB and SSIM of an image against the ground truth, both [H,W,3] floats in [0, 1] (clipped here).

    promptir compares the floats, data range 1; baryir and full compare 8-bit values, data range 255.
    """
    if protocol == "promptir":
        image, clean, data_range = image.clip(0, 1), clean.clip(0, 1), 1
    else:
        image, clean, data_range = to_uint8(image), to_uint8(clean), 255
    psnr = np.inf if np.array_equal(image, clean) else peak_signal_noise_ratio(clean, image, data_range=data_range)
    return float(psnr), float(structural_similarity(clean, image, win_size=SSIM_WINDOW, data_range=data_range, channel_axis=2))
