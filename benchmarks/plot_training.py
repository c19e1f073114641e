"""Draw the curves of a training run over its steps.

    python -m benchmarks.plot_training FOLDER OUT.png

The folder holds losses.csv and, if it validates, validation.csv, as train.py writes them, also while it runs.
Drawn is what the scheme has: restoration loss, validation, the dual's value, both sides of the alternation
(the terms of the map's loss, the potentials' loss), and of each source the cost and its potential. Needs
matplotlib (pip install matplotlib).
"""

import csv
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from math import ceil, isfinite, log10
from pathlib import Path

from utils.errors import InputError, one_line_errors

Rows = list[dict[str, str]]
Panel = tuple[str, str, str, dict[str, tuple[list[int], list[float]]]]  # title, unit, scale, steps and values


def read(path: Path) -> Rows:
    """A table's lines, without one that a run is just writing; none where there is no file."""
    if not path.is_file():
        return []
    return list(csv.DictReader(path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()))


def points(rows: Rows, column: str) -> tuple[list[int], list[float]]:
    """Steps and values of a column where it has any."""
    pairs = [(int(row["step"]), float(row.get(column) or "nan")) for row in rows]
    pairs = [pair for pair in pairs if isfinite(pair[1])]
    return [step for step, _ in pairs], [value for _, value in pairs]


def panels(folder: Path) -> list[Panel]:
    """The panels that have any curve; InputError where the folder has no steps."""
    losses, validation = read(folder / "losses.csv"), read(folder / "validation.csv")
    if not losses or "reconstruction" not in losses[0]:
        raise InputError(f"{folder / 'losses.csv'}: no steps, expected a table that train.py wrote")
    sources = [column.removeprefix("cost_") for column in losses[0] if column.startswith("cost_")]
    sets = {name: [row | {"gain": str(float(row["psnr"]) - float(row["psnr_in"]))} for row in validation
                   if row["set"] == name and row["psnr"] and row["psnr_in"]]
            for name in dict.fromkeys(row["set"] for row in validation)}
    every = [
        ("Restoration loss", "mean |restored - clean|, pixels in [0, 1]", "log",
         {"": points(losses, "reconstruction")}),
        ("Validation", "PSNR above the input's, dB", "linear",
         {name: points(rows, "gain") for name, rows in sets.items()}),
        ("Dual", "L(f, T), maximal over f, minimal over T", "linear",
         {"": points(losses, "dual"), "inner gap, estimate": points(losses, "inner_gap")}),
        ("Map's side", "what T descends, its terms before gamma", "log",
         {name: points(losses, name) for name in ("distance", "contrastive", "orthogonality")}),
        ("Potentials' side", "$f_k(b)$, mean weighted by $\\lambda_k$, descends", "linear",
         {"": points(losses, "potential_loss")}),
        ("Cost of each source", "$C_k$", "log",
         {name: points(losses, f"cost_{name}") for name in sources}),
        ("Potential of each source", "$E_k f_k(b)$", "linear",
         {name: points(losses, f"potential_mean_{name}") for name in sources}),
    ]
    shown = [(*panel, {label: curve for label, curve in curves.items() if curve[0]})
             for *panel, curves in every]
    return [panel for panel in shown if panel[3]]


def draw(shown: list[Panel], out: Path) -> None:
    """Draw the panels of `panels`."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("this plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = -(-len(shown) // 3)
    figure, axes = pyplot.subplots(rows, 3, figsize=(13, 3.5 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(shown):]:
        axis.remove()
    for axis, (title, unit, scale, curves) in zip(axes.flat, shown, strict=False):
        for label, curve in curves.items():
            axis.plot(*curve, label=label, marker="." if len(curve[0]) < 40 else "")
        axis.set_title(f"{title}\n{unit}", loc="left", fontsize="medium")
        axis.grid(alpha=0.3)
        sizes = sorted(abs(value) for _, values in curves.values() for value in values)
        if scale == "log":
            axis.set_yscale("log")
        elif sizes[-1] > 20 * sizes[len(sizes) // 2] > 0:       # a few spikes would flatten the rest
            axis.set_yscale("symlog", linthresh=10 ** ceil(log10(sizes[len(sizes) // 2])))
        if any(curves):
            axis.legend(fontsize="small", frameon=False, ncols=2)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, metavar="OUT.png")
    flags = parser.parse_args()
    draw(panels(flags.folder), flags.out)


if __name__ == "__main__":
    with one_line_errors():
        main()
