"""Find the images that an option file describes: folders, and each degraded file's clean partner.

Pairs are made by key, never by position in sorted lists. What is missing is named with what is there instead.
"""

import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from utils.errors import InputError, did_you_mean, first_few
from utils.files import list_files
from utils.images import EXTENSIONS

# Pairing rules: the clean file's name (without extension) for a degraded file's.
PAIRINGS: dict[str, Callable[[str], str]] = {
    "same": lambda stem: stem,                                  # a.png -> a.png, a.jpg
    "rain": lambda stem: re.sub("rain-", "norain-", stem),      # rain-12.png -> norain-12.png
    "haze": lambda stem: stem.split("_")[0],                    # 0025_0.8_0.2.jpg -> 0025.png
    "o_haze": lambda stem: stem.replace("_hazy", "_GT"),        # 01_outdoor_hazy.jpg -> 01_outdoor_GT.jpg
    "spa": lambda stem: stem + "gt",                            # 000.png -> 000gt.png
}


class Pair(NamedTuple):
    """One image of a set: a degraded file, a clean file, or both."""

    degraded: Path | None
    clean: Path | None

    @property
    def path(self) -> Path:
        """The file that names the image."""
        return self.degraded or self.clean


class Folder(NamedTuple):
    """A folder and its images."""

    path: Path
    files: list[Path]


def places(root: Path, folders: str | list[str]) -> list[Path]:
    """Where an option's folder may be: the first of a list that exists counts."""
    return [root / folder for folder in ([folders] if isinstance(folders, str) else folders)]


def find_images(root: Path, folders: str | list[str], where: str) -> Folder:
    """The images in the first of an option's folders that exists. `where` names the option.

    InputError where none exists, with a folder of a similar name, or where it holds no image.
    """
    looked_for = places(root, folders)
    folder = next(filter(Path.is_dir, looked_for), None)
    if folder is None:
        there = [path for missing in looked_for if missing.parent.is_dir()
                 for path in missing.parent.iterdir() if path.is_dir()]
        hint = next(filter(None, (did_you_mean(missing, there) for missing in looked_for)), "")
        raise InputError(f"{where}: no folder {', nor '.join(map(str, looked_for))}{hint}; "
                         "put the data there, or set root=PATH")
    if files := list_files(folder, EXTENSIONS):
        return Folder(folder, files)
    raise InputError(f"{where}: no images in {folder}, expected {', '.join(sorted(EXTENSIONS))}")


def composed(name: str | Path) -> str:
    """A name in Unicode's composed form (NFC): file systems keep an accent with its letter or apart."""
    return unicodedata.normalize("NFC", str(name))


def match_pairs(degraded: Folder, clean: Folder, pairing: str, where: str) -> list[Pair]:
    """Pair every degraded file with its clean one: by name, and by sub-folder where the clean folder has any.

    `pairing` is a key of PAIRINGS, or auto: `same` if it finds any partner at all, else the rule that finds
    most. Clean files may be left over. InputError where a degraded file has no partner, or two.
    """
    flat = all(path.parent == clean.path for path in clean.files)

    def key(path: Path, folder: Folder, rule: str = "same") -> Path:
        stem = PAIRINGS[rule](composed(path.stem))
        return Path(stem) if flat else Path(composed(path.relative_to(folder.path).parent), stem)

    partners: dict[Path, list[Path]] = {}
    for path in clean.files:
        partners.setdefault(key(path, clean), []).append(path)

    def unpaired(rule: str) -> list[Path]:
        return [path for path in degraded.files if key(path, degraded, rule) not in partners]

    rule = pairing
    if pairing == "auto":
        rule = "same" if len(unpaired("same")) < len(degraded.files) else min(
            PAIRINGS, key=lambda rule: len(unpaired(rule)))
    if missing := unpaired(rule):
        stems = {path.stem for path in clean.files}
        wanted = ((path, key(path, degraded, rule)) for path in missing[:4])
        names = first_few(f"{path} (expected {clean.path / name}.*{did_you_mean(name, stems)})"
                          for path, name in wanted)
        raise InputError(f"{where}: {len(missing)} of {len(degraded.files)} images have no partner: {names}")
    pairs = []
    for path in degraded.files:
        found = partners[key(path, degraded, rule)]
        found = [other for other in found if composed(other.name) == composed(path.name)] or found
        if len(found) > 1:
            raise InputError(f"{where}: {found[0]} and {found[1]} have the same name, expected one clean "
                             f"image for {path}")
        pairs.append(Pair(path, found[0]))
    return pairs
