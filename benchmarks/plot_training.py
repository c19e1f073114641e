"""Draw the curves of a training run over its steps.

    python -m benchmarks.plot_training FOLDER [FOLDER ...] OUT.png

A folder holds losses.csv and, if it validates, validation.csv, as train.py writes them, also while it runs.
Several folders are the legs of one run: a leg whose steps begin again is drawn after the one before. Drawn is
what the scheme has: restoration loss, validation, the dual's value, both sides of the alternation (the terms
of the map's loss, the potentials' loss), and of each source the cost and its potential. Needs matplotlib (pip
install matplotlib).
"""

import csv
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from math import ceil, isfinite, log10
from pathlib import Path

from utils.errors import InputError, one_line_errors

Rows = list[dict[str, str]]
SIDES = {"distance": "distance", "contrastive": "$L_{ctr}$", "orthogonality": "$L_{ort}$"}


def read(path: Path) -> Rows:
    """A table's lines, without one that a run is just writing; none where there is no file."""
    if not path.is_file():
        return []
    return list(csv.DictReader(path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()))


def read_legs(folders: list[Path]) -> tuple[Rows, Rows, list[int]]:
    """Losses and validation of all legs with steps that go on, and the steps at which a leg ended."""
    losses, validation, ends = [], [], []
    for folder in folders:
        rows, last = read(folder / "losses.csv"), int(losses[-1]["step"]) if losses else 0
        if not rows or "reconstruction" not in rows[0]:
            raise InputError(f"{folder / 'losses.csv'}: no steps, expected a table that train.py wrote")
        before = last if int(rows[0]["step"]) <= last else 0
        ends += [last] * bool(losses)
        for table, more in ((losses, rows), (validation, read(folder / "validation.csv"))):
            table += [row | {"step": str(int(row["step"]) + before)} for row in more]
    return losses, validation, ends


def points(rows: Rows, column: str) -> tuple[list[int], list[float]]:
    """Steps and values of a column where it has any."""
    pairs = [(int(row["step"]), float(row.get(column) or "nan")) for row in rows]
    pairs = [pair for pair in pairs if isfinite(pair[1])]
    return [step for step, _ in pairs], [value for _, value in pairs]


def panels(losses: Rows, validation: Rows) -> list[tuple[str, str, str, dict]]:
    """Title, unit, scale and curves {label: (steps, values)} of each panel that has any."""
    sources = list(dict.fromkeys(column.removeprefix("cost_") for row in losses for column in row
                                 if column.startswith("cost_")))
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
        ("Map's side", "what T descends; $L_{ctr}$ and $L_{ort}$ before gamma", "log",
         {label: points(losses, column) for column, label in SIDES.items()}),
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


def draw(shown: list[tuple[str, str, str, dict]], ends: list[int], out: Path) -> None:
    """Draw the panels of `panels`, a dotted line where a leg ended."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("this plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    columns = min(4, (len(shown) + 1) // 2) if len(shown) > 3 else len(shown)
    rows = -(-len(shown) // columns)
    pyplot.rc("axes", grid=True)
    pyplot.rc("axes.spines", top=False, right=False)
    pyplot.rc("grid", alpha=0.3)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4 * columns, 3.4 * rows), squeeze=False,
                                   sharex=True, layout="constrained")
    for axis in axes.flat[len(shown):]:
        axis.remove()
    for axis, (title, unit, scale, curves) in zip(axes.flat, shown, strict=False):
        for label, curve in curves.items():
            style = {"color": "black", "linewidth": 2} if label == "average" else {"linewidth": 1.2}
            axis.plot(*curve, label=label, marker="." if len(curve[0]) < 40 else "", **style)
        axis.set_title(title, loc="left", weight="bold", pad=20)
        axis.text(0, 1.02, unit, transform=axis.transAxes, fontsize="small", va="bottom")
        axis.tick_params(labelbottom=True)
        axis.xaxis.set_major_locator(ticker.MaxNLocator(5, steps=(1, 2, 5, 10)))
        axis.set_xlabel("step", loc="right", fontsize="small", labelpad=1)
        sizes = sorted(abs(value) for _, values in curves.values() for value in values)
        if scale == "log":
            axis.set_yscale("log")
            low, high = axis.get_ylim()
            axis.yaxis.set_major_locator(ticker.MaxNLocator(6, steps=(1, 2, 5, 10)) if high < 10 * low else
                                         ticker.LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
            axis.yaxis.set_minor_locator(ticker.NullLocator())
        elif sizes[-1] > 20 * sizes[len(sizes) // 2]:           # a few spikes would flatten the rest
            axis.set_yscale("symlog", linthresh=10 ** ceil(log10(sizes[len(sizes) // 2])))
        axis.yaxis.set_major_formatter("{x:g}")
        for end in ends:
            axis.axvline(end, color="gray", linestyle=":", linewidth=1)
        if any(curves):
            axis.legend(fontsize="small", frameon=False, ncols=3, loc="upper center",
                        bbox_to_anchor=(0.5, -0.13), handlelength=1.2, columnspacing=1)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("out", type=Path, metavar="OUT.png")
    flags = parser.parse_args()
    losses, validation, ends = read_legs(flags.folders)
    draw(panels(losses, validation), ends, flags.out)


if __name__ == "__main__":
    with one_line_errors():
        main()
