"""Draw the curves of a training run: restoration loss and validation PSNR over the steps.

    python -m benchmarks.plot_training FOLDER OUT.png

FOLDER holds losses.csv and validation.csv as train.py writes them. Needs matplotlib (pip install matplotlib).
"""

import argparse
import csv
from pathlib import Path


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("this plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    losses, validation = read(arguments.folder / "losses.csv"), read(arguments.folder / "validation.csv")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    steps = [int(row["step"]) for row in losses]
    left.plot(steps, [float(row["reconstruction"]) for row in losses], linewidth=0.8)
    left.set(xlabel="step", ylabel="mean |restored - clean|", yscale="log", title="restoration loss (training patches)")
    for name in dict.fromkeys(row["set"] for row in validation):
        rows = [row for row in validation if row["set"] == name and row["psnr"]]
        right.plot([int(row["step"]) for row in rows], [float(row["psnr"]) for row in rows], marker=".", label=name,
                   linewidth=2 if name == "average" else 1)
    right.set(xlabel="step", ylabel="PSNR in dB", title="validation (first images of each set)")
    right.legend(fontsize="x-small", ncols=2)
    figure.savefig(arguments.out, dpi=120)


if __name__ == "__main__":
    main()
