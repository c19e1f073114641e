"""Draw the curves of a training run over the steps.

    python -m benchmarks.plot_training FOLDER OUT.png

FOLDER holds losses.csv and validation.csv as train.py writes them: restoration loss, validation PSNR, the
dual's value with the estimated inner gap, congruence error, and of each source the transport cost and its
potential. Needs matplotlib (pip install matplotlib).
"""

import csv
import math
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from utils.errors import InputError, one_line_errors


def read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected one that train.py wrote")
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    losses, validation = read(arguments.folder / "losses.csv"), read(arguments.folder / "validation.csv")
    if not losses or "dual" not in losses[0]:
        raise InputError(f"{arguments.folder / 'losses.csv'}: no steps or no column dual, "
                         "expected a file that train.py wrote")
    try:
        import matplotlib
    except ImportError:
        raise InputError("this plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    sources = [column.removeprefix("cost_") for column in losses[0] if column.startswith("cost_")]
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 7), layout="constrained")
    (dual, cost, potential), (congruence, restoration, psnr) = axes

    def points(column: str) -> tuple[list[int], list[float]]:
        """Steps and values of a column where it has any."""
        rows = [(int(row["step"]), float(row[column])) for row in losses
                if not math.isnan(float(row.get(column, "nan")))]
        return [step for step, _ in rows], [value for _, value in rows]

    def draw(axis, column: str, **style) -> None:
        if points(column)[0]:
            axis.plot(*points(column), linewidth=0.8, **style)

    draw(restoration, "reconstruction")
    restoration.set(ylabel="mean |restored - clean|", yscale="log",
                    title="restoration loss (training patches)")
    for name in dict.fromkeys(row["set"] for row in validation):
        rows = [row for row in validation if row["set"] == name and row["psnr"]]
        psnr.plot([int(row["step"]) for row in rows], [float(row["psnr"]) for row in rows], marker=".",
                  label=name, linewidth=2 if name == "average" else 1)
    psnr.set(ylabel="PSNR in dB", title="validation (first images of each set)")
    draw(dual, "dual", label="L(f, T) of the batches")
    draw(dual, "inner_gap", marker=".", label="inner gap, estimate")
    dual.set(title="dual value and inner gap")
    draw(congruence, "congruence_error")
    congruence.set(title="congruence error, root mean square of $\\sum_k \\lambda_k f_k(b)$")
    for name in sources:
        draw(cost, f"cost_{name}", label=name)
        steps, mean = points(f"potential_mean_{name}")
        spread = points(f"potential_spread_{name}")[1]
        (line,) = potential.plot(steps, mean, linewidth=0.8, label=name)
        low, high = ([m + side * s for m, s in zip(mean, spread, strict=True)] for side in (-1, 1))
        potential.fill_between(steps, low, high, color=line.get_color(), alpha=0.15)
    cost.set(title="transport cost $C_k$ of each source")
    potential.set(title="$f_k$ on its own source: mean and spread")
    for axis in list(figure.axes):
        axis.set(xlabel="step")
        if not axis.has_data():                                 # a run without decoder or without test sets
            axis.remove()
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="x-small", ncols=2)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=100)


if __name__ == "__main__":
    with one_line_errors():
        main()
