"""What b and r carry: images restored with r = 0, with b = 0 and with both, and the differences.

    python -m benchmarks.contributions --opt options/test_real.yml [--set checkpoint=PATH root=PATH]

The experiment of the journal version (arXiv 2602.23169): R1 is restored with the barycenter latent b set
to zero, R2 with the residual latent r set to zero, R3 with both. R3 - R1 shows what b carries (structure that
all degradations share), R3 - R2 what r carries (where the degradation was). Prints PSNR of the three for each
set, and writes it as CSV (--out) and, of the first images of each set, a strip beside it, differences as
0.5 + difference / 2:

    input | r = 0 (R2) | b = 0 (R1) | both (R3) | R3 - R1 | R3 - R2
"""

from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.ablations import OneLatent
from data.datasets import open_sets
from utils import distributed
from utils.checkpoint import load_network
from utils.errors import InputError, one_line_errors
from utils.evaluation import precision_on, restore_set
from utils.files import write_csv
from utils.images import save_image, to_image
from utils.metrics import Metrics, means
from utils.options import TestOptions, load_options, option_parser
from utils.tables import as_text

SIDES = {"r = 0": "barycenter", "b = 0": "residual", "both": "both"}    # what the decoder gets
STRIPS = 2                                                              # of each set


def strip(degraded: np.ndarray, restored: dict[str, np.ndarray]) -> Image.Image:
    """Input, the three restored images and the two differences side by side; all [H,W,3] in [0, 1]."""
    differences = [0.5 + (restored["both"] - restored[side]) / 2 for side in ("b = 0", "r = 0")]
    return to_image(np.concatenate([degraded, *restored.values(), *differences], axis=1))


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/contributions.csv"))
    flags = parser.parse_args()
    options = load_options(TestOptions, flags.opt, flags.set)
    sets = open_sets(options.sets, options, "sets")
    device = distributed.setup()[2]
    nets = [load_network(options.checkpoint, device, partial(OneLatent, kept)) for kept in SIDES.values()]
    if not nets[0].barycenter:
        raise InputError(f"{options.checkpoint}: a plain backbone, expected a network with a barycenter map")
    precision = precision_on(device, options.precision)

    metrics, rows, folder = Metrics(["psnr"]), [], flags.out.with_suffix("")
    for images in sets:
        scores = []
        each = (restore_set(net, images, options.protocol, metrics, strip=options.strip, precision=precision)
                for net in nets)
        for index, results in enumerate(zip(*each, strict=True)):       # of an image, from the three networks
            first, by_side = results[0], dict(zip(SIDES, results, strict=True))
            if first.scores:
                psnr = {side: result.scores["psnr"] for side, result in by_side.items()}
                scores.append({"input": first.scores_in["psnr"], **psnr})
            if index < STRIPS:
                path = folder / images.name / images.name_of(index).with_suffix(".png").name
                save_image(strip(first.degraded, {side: one.restored for side, one in by_side.items()}), path)
        rows.append([images.name, len(images), *(means(scores).values() or [""] * (1 + len(SIDES)))])
    write_csv(flags.out, [["set", "images", "input", *SIDES], *rows])
    cells = [[name, str(count), *(f"{value:.2f}" if value != "" else "-" for value in values)]
             for name, count, *values in rows]
    print(as_text([["PSNR in dB", "images", "input", *SIDES], *cells]))
    print(f"protocol {options.protocol}, checkpoint {options.checkpoint}, option file {options.file}, "
          f"precision {precision}, {date.today()}; {flags.out}; strips in {folder}")


if __name__ == "__main__":
    with one_line_errors():
        main()
