"""A page to look at: index.html beside the restored images, which opens from the file system.

It shows the tables and, of each image, a slider between input, restored image and ground truth. report/
beside it holds inputs, ground truths (JPEG, quality 95) and thumbnails, the input's left half beside the
restored right one. The page is utils/report.html.
"""

import contextlib
import html
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np

from utils.errors import InputError, printable
from utils.files import write_text
from utils.images import as_rgb, decode, save_image, to_image
from utils.tables import Lines

TEMPLATE = Path(__file__).with_suffix(".html")
MARK = '<meta name="generator" content="BaryIR">'           # by which an earlier page is known
LARGEST, THUMBNAIL = 8192, 320                              # pixels of previews, the longer side


class Report:
    """The page of one folder of results: add() each image, then write()."""

    def __init__(self, folder: Path, where: str = "report") -> None:
        """InputError beginning with `where` where a page or folder of these names is the user's."""
        self.folder, self.page, self.images = folder, folder / "index.html", []
        if os.path.lexists(self.page):
            if not self.page.is_file() or MARK not in self.page.read_text("utf-8", "replace")[:2000]:
                raise InputError(f"{where}: {self.page} is there and no report, expected another folder")
        elif os.path.lexists(folder / "report") and not list((folder / "report").glob("000000-*.jpg")):
            raise InputError(f"{where}: {folder / 'report'} is there, no report's, expected another folder")

    def add(self, group: str, name: str, path: Path, pictures: Sequence[np.ndarray | None],
            scores: Sequence[dict[str, float]] = ({}, {})) -> None:
        """Add an image: its set and name as they are shown, and its restored file, below the folder.

        pictures: input, restored and ground truth or None, [H,W,3] in [0, 1]. scores: metrics of the input
        and of the restored image.
        """
        degraded, restored, clean = (None if pixels is None else to_image(pixels) for pixels in pictures)
        thumbnail, middle = degraded.copy(), degraded.width // 2
        thumbnail.paste(restored.crop((middle, 0, *restored.size)), (middle, 0))
        thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
        entry = {"set": printable(group), "name": printable(name), "restored": self.link(path),
                 "size": restored.size, "scores": [known(part) for part in scores]}
        for kind, image in ("input", degraded), ("clean", clean), ("thumbnail", thumbnail):
            if image:
                target = self.folder / f"report/{len(self.images):06}-{kind}.jpg"
                image.thumbnail((LARGEST, LARGEST))
                save_image(image, target)
                entry[kind] = self.link(target)
        self.images.append(entry)

    def link(self, path: Path) -> str:
        """A file's address from the page, whatever its name holds."""
        return quote(os.fsencode(path.relative_to(self.folder).as_posix()))

    def write(self, title: str, tables: Iterable[Lines] = (), notes: Iterable[str] = ()) -> Path:
        """Write the page with the tables above its images; returns its path."""
        parts = {"mark": MARK, "title": html.escape(printable(title)),
                 "data": json.dumps(self.images).replace("<", "\\u003c"),
                 "tables": "\n".join(map(as_html, tables)),
                 "notes": "\n".join(f"<p>{html.escape(printable(note))}</p>" for note in notes)}
        page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], TEMPLATE.read_text("utf-8"))
        write_text(self.page, page)
        return self.page


def known(scores: dict[str, float]) -> dict[str, float]:
    """Scores that JSON can hold: equal images have no finite PSNR, shown as 999."""
    return {name: 999.0 if value == float("inf") else round(float(value), 4)
            for name, value in scores.items() if value == value}


def as_html(lines: Lines) -> str:
    """A table whose columns the page can sort; rows of ours marked."""
    header, *body = [[html.escape(printable(cell)) for cell in line] for line in lines]
    head = "".join(f'<th scope="col"><button type="button">{cell}</button></th>' for cell in header)
    rows = "\n".join(f'<tr{" class=ours" * line[0].startswith("ours")}><th scope="row">{line[0]}</th>'
                     + "".join(f"<td>{cell}</td>" for cell in line[1:]) + "</tr>" for line in body)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'


def photograph_report(report: Report, jobs: Iterable[tuple[Path, Path]], note: str = "") -> Path | None:
    """The page of photographs and their restored files, of those that are there, below a note, or None."""
    for source, target in jobs:
        with contextlib.suppress(InputError):               # what could not be restored was said
            before, after = (as_rgb(decode(path, [])[1]) / np.float32(255) for path in (source, target))
            if before.shape == after.shape:
                report.add("", str(target.relative_to(report.folder)), target, (before, after, None))
    return report.write(f"Photographs in {report.folder}", (), [note]) if report.images else None
