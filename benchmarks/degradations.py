"""A page of contact sheets: each degradation of data.degradations at three strengths, a row each.

    python -m benchmarks.degradations IMAGE OUT.png
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.utils import make_grid

from data.degradations import DEGRADATIONS, Parts
from utils.errors import one_line_errors
from utils.images import read_image, save_image

STRENGTHS = {"noise": (15, 25, 50), "camera": (2, 4, 7), "poisson": (200, 50, 15), "rain": (1, 2, 3),
             "haze": (0.6, 1.2, 2), "underwater": (0.5, 1, 2), "blur": (7, 15, 25), "defocus": (1.5, 3, 5),
             "gaussian_blur": (1, 2, 4), "lowlight": (2, 4, 6), "jpeg": (50, 20, 10),
             "jpeg_444": (50, 20, 10), "clean": (0, 0, 0)}


def contact_sheet(clean: np.ndarray) -> Image.Image:
    """All degradations of an image [H,W,3] uint8, in the order of STRENGTHS."""
    sheet = np.full((len(STRENGTHS), 3, *clean.shape), 255, np.uint8)
    for row, (name, strengths) in zip(sheet, STRENGTHS.items(), strict=True):
        for cell, strength in zip(row, strengths, strict=True):
            degraded, _ = DEGRADATIONS[name](clean, strength, np.random.default_rng(0), Parts())
            cell[:degraded.shape[0], :degraded.shape[1]] = degraded         # some of a camera's are smaller
    images = torch.from_numpy(sheet).flatten(0, 1).permute(0, 3, 1, 2)
    return Image.fromarray(make_grid(images, nrow=3, padding=4, pad_value=255).permute(1, 2, 0).numpy())


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, help="of which the upper left 256 x 384 pixels are shown")
    parser.add_argument("out", type=Path)
    flags = parser.parse_args()
    save_image(contact_sheet(read_image(flags.image)[:256, :384]), flags.out)
    print(f"{flags.out}: a row for each of {', '.join(f'{name} {row}' for name, row in STRENGTHS.items())}")


if __name__ == "__main__":
    with one_line_errors():
        main()
