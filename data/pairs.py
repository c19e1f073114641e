"""Find the images that an option file describes: folders, file lists, each degraded file's clean partner.

Pairs are made by key, never by position in sorted lists. What is missing is named with what is there instead.
"""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from utils.errors import InputError, first_few
from utils.files import list_files
from utils.images import EXTENSIONS

# The public data sets' folders below the root, as PromptIR, AdaIR and BaryIR have them (METHOD section 4).
LAYOUTS = {
    "denoise": {"clean": "Train/Denoise"},
    "derain": {"degraded": "Train/Derain/rainy", "clean": "Train/Derain/gt"},
    "dehaze": {"degraded": "Train/Dehaze/synthetic", "clean": "Train/Dehaze/original"},
    "deblur": {"degraded": "Train/Deblur/blur", "clean": "Train/Deblur/sharp"},
    "lowlight": {"degraded": "Train/lowlight/low", "clean": "Train/lowlight/high"},
    "single": {"degraded": "Train/single/degraded", "clean": "Train/single/target"},
}

# Pairing rules: the clean file's name (without extension) for a degraded file's.
PAIRINGS: dict[str, Callable[[str], str]] = {
    "same": lambda stem: stem,                                  # a.png -> a.png, a.jpg
    "rain": lambda stem: re.sub("rain-", "norain-", stem),      # rain-12.png -> norain-12.png
    "haze": lambda stem: stem.split("_")[0],                    # 0025_0.8_0.2.jpg -> 0025.png
    "o_haze": lambda stem: stem.replace("_hazy", "_GT"),        # 01_outdoor_hazy.jpg -> 01_outdoor_GT.jpg
    "spa": lambda stem: stem + "gt",                            # 000.png -> 000gt.png
}


@dataclass(frozen=True)
class Pair:
    """One image of a set: a degraded file, a clean file, or both."""

    degraded: Path | None
    clean: Path | None

    @property
    def path(self) -> Path:
        """The file that names the image."""
        return self.degraded or self.clean


class MissingFolder(InputError):
    """A folder of an option file is absent; `similar` where another one looks like it."""

    similar = False


def find_folder(root: str, folders: str | list[str], where: str) -> Path:
    """The first of an option's folders that is below root; else MissingFolder, with what looks like it."""
    candidates = [Path(root) / folder for folder in ([folders] if isinstance(folders, str) else folders)]
    for folder in candidates:
        if folder.is_dir():
            return folder
    hints = [folder_hint(Path(root), folder) for folder in candidates]
    similar = next((hint for hint in hints if hint.startswith(", did you mean")), "")
    error = MissingFolder(f"{where}: no folder {', nor '.join(map(str, candidates))}{similar or hints[0]}")
    error.similar = bool(similar)
    raise error


def folder_hint(root: Path, folder: Path) -> str:
    """", did you mean X?" if a folder's first absent part resembles one below root; else what is there."""
    absent = folder
    while absent != root and root in absent.parents and not absent.parent.is_dir():
        absent = absent.parent
    if absent == root or root not in absent.parents:
        return ""
    there = {path.name.lower(): path for path in sorted(absent.parent.iterdir())
             if path.is_dir() and not path.name.startswith(".")}
    name = absent.name.lower()
    near = (difflib.get_close_matches(name, there, n=1)
            or [other for other in there if name in other or other in name])
    if near:
        return f", did you mean {there[near[0]]}?"
    return f"; {absent.parent} holds {first_few(path.name for path in there.values())}" if there else ""


def list_others(folder: Path) -> list[Path]:
    """Files of a folder that are no images by their extension, hidden ones left out."""
    files = (path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return sorted(path for path in files if path.suffix.lower() not in EXTENSIONS)


def find_images(folder: Path, where: str) -> list[Path]:
    """All images of a folder; InputError where it holds none. `where` names the option."""
    files = list_files(folder, EXTENSIONS)
    if not files:
        raise InputError(f"{where}: no images in {folder}, expected {', '.join(sorted(EXTENSIONS))}")
    return files


def read_file_list(path: Path, folder: Path, files: list[Path], where: str) -> tuple[list[Path], list[str]]:
    """The files of a folder that a list names, in the list's order, and its entries that are not there.

    A text file, one name a line, relative to the folder or to the one above it (as in PromptIR's lists); of a
    line that is no name, what follows the first blank is not read. InputError where a name is listed twice,
    or leads out of the folder.
    """
    if not path.is_file():
        raise InputError(f"{where}: no file {path}")
    known = {file.relative_to(base).as_posix(): file for base in (folder.parent, folder) for file in files}
    try:
        lines = [line.strip().lstrip("/") for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise InputError(f"{where}: {path} is not a text file, expected one file name a line") from None
    names = [line if line in known else line.split()[0] for line in lines if line]
    if not names:
        raise InputError(f"{where}: {path} is empty, expected one file name a line")
    if outside := [name for name in names if ".." in Path(name).parts]:
        raise InputError(f"{where}: {path} lists {first_few(outside)}, expected names below {folder}")
    counts = Counter(known.get(name, name) for name in names)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise InputError(f"{where}: {path} lists {first_few(map(str, twice))} more than once")
    return [known[name] for name in names if name in known], [name for name in names if name not in known]


def near_miss(name: str, there: Iterable[str]) -> str:
    """", but X is there: ..." for an absent file, where a known trap explains it (METHOD section 4).

    Lists write BSD's 123.jpg as a123.jpg; a copy has .png for .jpg, or other capitals.
    """
    stem, there = Path(name).stem, list(there)
    by_stem = {Path(other).stem: other for other in there}
    if stem in by_stem:
        return f", but {by_stem[stem]} is there: another extension"
    for near in (stem.removeprefix("a"), f"a{stem}"):
        if near in by_stem:
            return f", but {by_stem[near]} is there: one of the two has a prefix a"
    by_lower_case = {other.lower(): by_stem[other] for other in by_stem}
    near = by_lower_case.get(stem.lower())
    return f", but {near} is there: other capitals" if near else ""


@dataclass
class Matching:
    """What pairing by name found: pairs; degraded files without partner, with the path, less extension, that
    it should have; and degraded files with two partners that fit equally, with both."""

    pairs: list[Pair]
    unpaired: list[tuple[Path, Path]]
    ambiguous: list[tuple[Path, Path, Path]]


def match_pairs(degraded: list[Path], clean: list[Path], pairing: str, degraded_folder: Path,
                clean_folder: Path) -> Matching:
    """Pair every degraded file with its clean one: by name, and by sub-folder where the clean folder has any.

    `pairing` is a key of PAIRINGS, or auto: `same` if it finds any partner at all, else the rule that finds
    most. Clean files may be left over.
    """
    flat = all(path.parent == clean_folder for path in clean)

    def key(path: Path, folder: Path, rule: str = "same") -> Path:
        stem = PAIRINGS[rule](path.stem)
        return Path(stem) if flat else path.relative_to(folder).with_name(stem)

    by_key: dict[Path, list[Path]] = {}
    for path in clean:
        by_key.setdefault(key(path, clean_folder), []).append(path)

    def match(rule: str) -> Matching:
        matching = Matching([], [], [])
        for path in degraded:
            wanted = key(path, degraded_folder, rule)
            partners = by_key.get(wanted, [])
            partners = [p for p in partners if p.name == path.name] or partners
            if not partners:
                matching.unpaired.append((path, clean_folder / wanted))
            elif len(partners) > 1:
                matching.ambiguous.append((path, *partners[:2]))
            else:
                matching.pairs.append(Pair(path, partners[0]))
        return matching

    if pairing != "auto":
        return match(pairing)
    same = match("same")
    return (same if len(same.unpaired) < len(degraded)
            else min(map(match, PAIRINGS), key=lambda matching: len(matching.unpaired)))
