"""Result tables as text, Markdown and CSV: a row for each set, and the paper's published rows beside ours.

The published figures are data, benchmarks/published.yml and peers.yml.
"""

import html
import math
import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from utils.errors import InputError, one_line
from utils.evaluation import Row, average_row, scores_of
from utils.files import write_csv
from utils.options import TestOptions

PUBLISHED = Path(__file__).parent.parent / "benchmarks/published.yml"
PEERS = PUBLISHED.with_name("peers.yml")
NAMES = {"psnr": "dB", "ssim": "SSIM", "psnr_y": "dB of Y", "ssim_y": "SSIM of Y", "lpips": "LPIPS"}
DIGITS = {"psnr": 2, "ssim": 4, "psnr_y": 2, "ssim_y": 4, "lpips": 4}
PUBLISHED_DIGITS = {"psnr": 2, "ssim": 3}

Lines = list[list[str]]         # a table's cells, its header first


def read_published(table: str, where: str) -> dict:
    """A published table: the name of its reference row, its sets, and its rows: scores by method and set."""
    files = (yaml.safe_load(path.read_text(encoding="utf-8")) for path in (PUBLISHED, PEERS))
    tables = {name: content for file in files for name, content in file["tables"].items()}
    if table not in tables:
        raise InputError(f"{where}: {table!r}, expected a table of {PUBLISHED.name}: {', '.join(tables)}")
    content = tables[table]
    for method, pairs in content["rows"].items():
        scores = [dict(zip(PUBLISHED_DIGITS, pair, strict=False)) for pair in pairs]        # or PSNR alone
        content["rows"][method] = dict(zip(content["sets"], scores, strict=True))
    return content


def scores_cell(scores: dict[str, float], digits: dict[str, int], mark: str = "", sign: str = "") -> str:
    """The metrics that `digits` names, - for one that was not measured and for all if none was."""
    cells = [f"{scores[name]:{sign}.{places}f}" if name in scores else "-" for name, places in digits.items()]
    return " / ".join(cells) + mark if scores.keys() & digits.keys() else "-"


def set_table(rows: Sequence[Row], metrics: Sequence[str]) -> Lines:
    """Each set's images (of how many, if some are missing), metrics of the input and of what was restored."""
    names, digits = " / ".join(NAMES[name] for name in metrics), {name: DIGITS[name] for name in metrics}
    lines = [["set", "images", f"input {names}", f"restored {names}"]]
    for row in rows:
        count = f"{row.images} of {row.expected}*" if row.incomplete else str(row.images)
        lines.append([row.set, count, scores_cell(row.scores_in, digits), scores_cell(row.scores, digits)])
    return lines


def comparison_table(rows: Sequence[Row], published: dict) -> Lines:
    """The paper's table with our row: methods down, sets across; ours marked * if images are missing.

    Our average is given where every set of the paper's table was measured; our row then has its place in the
    order of the averages, else it is the last.
    """
    ours = comparable(rows, published)
    lines = [["method (dB / SSIM)", *published["sets"]]]
    lines += [[method, *(scores_cell(scores, PUBLISHED_DIGITS) for scores in figures.values())]
              for method, figures in published["rows"].items()]
    cells, differences = [], []
    for name, figures in published["rows"][published["reference"]].items():
        scores = ours[name].scores if name in ours else {}
        mark = "*" if name in ours and ours[name].incomplete else ""
        cells.append(scores_cell(scores, PUBLISHED_DIGITS, mark))
        difference = {metric: scores[metric] - value for metric, value in figures.items() if metric in scores}
        differences.append(scores_cell(difference, PUBLISHED_DIGITS, mark, sign="+"))
    average = ours["average"].scores.get("psnr", math.inf) if "average" in ours else math.inf
    averages = [figures.get("average", {}).get("psnr", 0) for figures in published["rows"].values()]
    lines.insert(1 + sum(psnr < average for psnr in averages), ["ours", *cells])
    return [*lines, [f"ours - {published['reference']}", *differences]]


def comparable(rows: Sequence[Row], published: dict) -> dict[str, Row]:
    """Our rows that have a column in a published table, and, if all its sets are there, their average."""
    found = {row.set: row for row in rows if row.scores and row.set != "average"}
    ours = {name: found[name] for name in published["sets"] if name in found}
    whole = "average" in published["sets"] and len(ours) == len(published["sets"]) - 1
    return {**ours, "average": average_row([*ours.values()])} if whole else ours


def remarks(rows: Sequence[Row], published: dict | None, options: TestOptions) -> list[str]:
    """What a reader of the table must know: how it was made, what is not comparable."""
    lines = [f"protocol {options.protocol}, checkpoint {options.checkpoint}, option file {options.file}, "
             f"precision {options.precision}" + ", tones of the input kept" * options.keep_tones]
    incomplete = [f"{row.set} ({row.images} of {row.expected} images)" for row in rows
                  if row.incomplete and row.set != "average"]
    if incomplete:
        lines.append(f"* not the published test set: {', '.join(incomplete)}")
    if published:
        lines.append("published rows as their papers give them: most follow protocol promptir, "
                     "the authors' own tester is protocol baryir")
    return lines


def as_text(lines: Lines) -> str:
    """Columns, two blanks apart."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in padded)


def markdown(text: str) -> str:
    """Text as Markdown that shows it as it is, also where a name holds Markdown or HTML."""
    return re.sub(r"([\\`*|\[\]])", r"\\\1", html.escape(one_line(text, 10_000), quote=False))


def as_markdown(lines: Lines) -> str:
    """A Markdown table; what a name holds of Markdown or HTML is shown as it is."""
    header, *body = [list(map(markdown, line)) for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *body))


def write_set_csv(path: Path, rows: Sequence[Row], metrics: Sequence[str], protocol: str,
                  checkpoint: str) -> None:
    """The sets' table with full precision: empty cells where there is no ground truth."""
    header = ["set", "images", "expected", *columns(metrics), "protocol", "checkpoint"]
    lines = [[row.set, row.images, row.expected or "", *scores_of(row, metrics), protocol, checkpoint]
             for row in rows]
    write_csv(path, [header, *lines])


def columns(metrics: Sequence[str]) -> list[str]:
    """What `scores_of` gives: the input's metrics, then those of what was restored."""
    return [*(f"{name}_in" for name in metrics), *metrics]
