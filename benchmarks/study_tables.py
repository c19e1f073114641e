"""Tables of the study's figures, which lie in benchmarks/study (benchmarks/study.py says what they are)."""

import csv
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.ablations import DESIGNS, ROWS
from benchmarks.intervals import effects, interval
from utils.errors import InputError
from utils.files import write_csv
from utils.tables import as_text

RESULTS = Path("benchmarks/study")
RUN = ("row", "seed", "sources", "weights")
TABLES = {
    "sets": (*RUN, "group", "set", "images", "psnr", "ssim"),
    "images": (*RUN, "group", "set", "image", "psnr", "ssim"),
    "runs": (*RUN, "parameters", "steps", "samples", "core_hours", "samples_hash", "date", "machine"),
    "latents": (*RUN, "quantity", "z", "b", "r"),
}
GROUPS = ("seen", "level", "type", "mixed", "left out")
QUANTITIES = ("distance between sources", "variance", "probe accuracy", "same scene", "retrieval")
CLAIMED, TREATED = 0.15, 0.5                    # dB, share of a distance: rule of options/decide/base.yml
NEW = 2                                         # the first of the seeds of its addendum


def design_of(row: str) -> str:
    """The design of a row, of which a colon may say more ("transport: T off")."""
    return ROWS[row.partition(":")[0]].design


def label(row: str, weights: str) -> str:
    """A row in the tables: its name and, in options/study, the weights where they are the last ones."""
    name, colon, given = row.partition(":")
    return name + ", last" * (weights == "last" and design_of(row) == "study") + colon + given


def group(images: str, absent: str) -> str:
    """The group of a test set: its name's first word, or that it involves what training lacks."""
    words = images.split("_")
    return "left out" if absent in words else words[0]


def write(folder: Path, table: str, rows: list) -> None:
    write_csv(folder / f"{table}.csv", [TABLES[table], *rows])


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text("utf-8").splitlines())) if path.exists() else []


def collect(output: Path) -> None:
    """Bring the finished runs' figures to benchmarks/study, whose other runs stay."""
    done = sorted(path.parent for path in output.glob("*/runs.csv"))
    for table in TABLES:
        runs = {}
        for folder in (RESULTS, *done):
            found = defaultdict(list)
            for line in read(folder / f"{table}.csv"):
                found[line["row"], int(line["sources"]), int(line["seed"]), line["weights"]].append(line)
            runs |= found
        write(RESULTS, table, [[*line.values()] for run in sorted(runs) for line in runs[run]])


def finished() -> set[tuple[str, str]]:
    """Labels and seeds of the runs in benchmarks/study."""
    return {(label(line["row"], line["weights"]), line["seed"]) for line in read(RESULTS / "runs.csv")}


class Figures:
    """What the files in benchmarks/study say of a design, of some seeds or all; rows: labels of its runs."""

    def __init__(self, design: str, seeds: Iterable[str] = ()) -> None:
        self.design = DESIGNS[design]
        self.sets, self.images, self.latents = (
            [line | {"row": label(line["row"], line["weights"])} for line in read(RESULTS / f"{table}.csv")
             if design_of(line["row"]) == design and (not seeds or line["seed"] in seeds)]
            for table in ("sets", "images", "latents"))
        labels, groups = ({line[column] for line in self.images} for column in ("row", "group"))
        self.rows = sorted(labels, key=lambda row: ([*ROWS].index(row.partition(",")[0]), row))
        self.groups = [name for name in GROUPS if name in groups]
        self.oracle = defaultdict(list)                         # gains by set
        for (_, of_set), gain in self.above("oracle", "oracle: input", *GROUPS).items():
            self.oracle[of_set].append(gain)

    def psnr(self, row: str, *groups: str) -> dict[tuple[str, str], float]:
        """By seed and set, of the sets of some groups."""
        return {(line["seed"], line["set"]): float(line["psnr"]) for line in self.sets
                if line["row"] == row and line["group"] in groups}

    def above(self, row: str, other: str, *groups: str) -> dict[tuple[str, str], float]:
        """PSNR of a row less that of another, by seed and set."""
        others = self.psnr(other, *groups)
        return {key: value - others[key] for key, value in self.psnr(row, *groups).items()}

    def gain(self, row: str, name: str) -> str:
        """Of a group: PSNR, gain over the input, and its share of the oracle's gain on the same sets."""
        gains = self.above(row, f"{row}: input", name)
        gain, possible = over_seeds(gains), over_seeds({key: mean(self.oracle[key[1]]) for key in gains})
        share = "" if np.isnan(possible) else f" {gain / possible:.0%}"
        return f"{over_seeds(self.psnr(row, name)):.2f} {gain:+.2f}{share}" if gains else "-"

    def difference(self, row: str, other: str, groups: tuple[str, ...], without: str = "") -> tuple:
        """Mean difference in PSNR over the sets of some groups, and its interval."""
        found = {name: [(int(line["seed"]), line["set"], line["image"].partition("_")[0], float(line["psnr"]))
                        for line in self.images if line["row"] == name and line["group"] in groups
                        and line["set"] != without] for name in (row, other)}
        seeds = [{seed for seed, *_ in scores} for scores in found.values()]
        both = seeds[0] & seeds[1] if self.design.paired else seeds[0] | seeds[1]
        if not both or not all(seeds):
            return np.nan, np.nan, np.nan
        ours, theirs = (effects(score for score in scores if score[0] in both) for scores in found.values())
        return interval(ours, theirs, self.design.paired)

    def latent(self, row: str, quantity: str) -> list[float]:
        """In z, b and r: mean over seeds; nan where there is none."""
        lines = [line for line in self.latents if line["row"] == row and line["quantity"] == quantity]
        return [mean(line[space] or "nan" for line in lines) for space in "zbr"]


def mean(values: Iterable[float | str]) -> float:
    """nan where there are none."""
    return float(np.mean([float(value) for value in values] or np.nan))


def over_seeds(found: dict[tuple[str, str], float]) -> float:
    """Mean over seeds of what a seed has in the mean of its sets: not all have as many."""
    seeds = {seed for seed, _ in found}
    return mean(mean(value for (seed, _), value in found.items() if seed == one) for one in seeds)


def tables() -> str:
    """All tables, of the files in benchmarks/study, by design."""
    runs = read(RESULTS / "runs.csv")
    if not runs:
        raise InputError(f"{RESULTS}: no runs.csv yet, expected runs: python -m benchmarks.study --root PATH")
    text = ["Equal conditions", as_text([list(TABLES["runs"]), *([*line.values()] for line in runs)])]
    for design in DESIGNS:
        figures = Figures(design)
        if figures.rows:
            text += [f"\noptions/{design}", *map(as_text, tables_of(figures))]
    done = [{line["seed"] for line in runs if line["row"] == row} for row in ("transport", "frozen")]
    for name, since, *than in (("The rule", 0, "transport", 0), ("Its addendum", NEW, "frozen", 1)):
        if seeds := [seed for seed in done[0] & done[1] if int(seed) >= since]:
            text += [f"{name}, seeds {', '.join(sorted(seeds))}: {verdict(Figures('decide', seeds), *than)}"]
    return "\n".join(text)


def tables_of(figures: Figures) -> list[list[list[str]]]:
    """A design's tables: gains, differences to the baselines, sets, checks, latents."""
    rows, groups = figures.rows, figures.groups
    pairs = {f"{row} less {other}": (row, other) for other in figures.design.baselines if other in rows
             for row in rows if row != other and row.endswith("_settled") == other.endswith("_settled")}
    parts = {" and ".join(part): part for part in (*((name,) for name in groups), figures.design.unseen)}
    trained = {row: figures.psnr(row if row in rows else f"{rows[0]}: input", *GROUPS[:-1])
               for row in ("input", *rows)}
    sets = sorted({of_set for psnr in trained.values() for _, of_set in psnr},
                  key=lambda name: (GROUPS.index(group(name, "")), name))
    given = dict.fromkeys(line["row"] for line in figures.sets if ": " in line["row"])
    split = filter({line["row"] for line in figures.latents}.__contains__, rows)       # those with z, b, r
    every = [
        grid("PSNR in dB, gain over the input, share of the oracle's gain", rows, groups, figures.gain),
        grid("difference in dB, 95 % interval", pairs, parts,
             lambda pair, part: shown(*figures.difference(*pairs[pair], parts[part]))),
        grid("PSNR in dB, of the trained", sets, trained, lambda name, row:
             f"{mean(psnr for (_, of_set), psnr in trained[row].items() if of_set == name):.2f}"),
        grid("change in dB by what the decoder is given",
             [name for name in given if not name.endswith(": input")], groups, lambda row, name:
             f"{over_seeds(figures.above(row, row.partition(':')[0], name)):+.2f}".replace("+nan", "-")),
        grid("matched scenes: z / b / r", split, QUANTITIES, lambda row, quantity:
             " / ".join(f"{value:.3f}" for value in figures.latent(row, quantity))),
    ]
    return [table for table in every if len(table) > 1]


def grid(title: str, rows: Iterable[str], columns: Iterable[str],
         cell: Callable[[str, str], str]) -> list[list[str]]:
    return [[title, *columns], *([row, *(cell(row, column) for column in columns)] for row in rows)]


def shown(middle: float, low: float, high: float) -> str:
    between = "(one seed)" if np.isnan(low) else f"[{low:+.2f}, {high:+.2f}]"
    return "-" if np.isnan(middle) else f"{middle:+.2f} {between}"


def verdict(figures: Figures, than: str, latent: int) -> str:
    """The rule of options/decide/base.yml, applied to the runs that there are.

    than, latent: the row and which of its z, b, r the distance in `transport`'s b is compared with.
    """
    unseen = figures.design.unseen
    difference = partial(figures.difference, "transport", "frozen", unseen)
    gain, low, high = difference()
    sets = {of_set for _, of_set in figures.psnr("transport", *unseen)}
    least = min(difference(without=name)[0] for name in sets)
    (in_z, in_b, _), others = (figures.latent(row, "distance between sources") for row in ("transport", than))
    outcome = ("cannot be told: T did not bring the sources together" if not in_b <= TREATED * others[latent]
               else "holds" if gain >= CLAIMED and low > 0 and least > 0
               else "fails for certain" if high < CLAIMED else "fails")
    return (f"transport less frozen, {' and '.join(unseen)}: {shown(*difference())} dB, "
            f"{least:+.2f} without its best set; distance between sources {in_z:.3f} in z, {in_b:.3f} in b, "
            f"{others[latent]:.3f} in {than}'s {'zbr'[latent]}. The claim {outcome}")
