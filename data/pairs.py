"""Find the images that an option file describes: folders, file lists, each degraded file's clean partner.

Pairs are made by key, never by position in sorted lists. What is missing is named with what is there instead.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from utils.errors import InputError, did_you_mean, first_few
from utils.files import list_files
from utils.images import EXTENSIONS

# The public data sets' folders below the root, as PromptIR, AdaIR and BaryIR have them.
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
    """A folder of an option file is absent."""


def find_images(root: Path, folders: str | list[str], where: str) -> tuple[Path, list[Path]]:
    """The first of an option's folders that is below root, and its images, at least one.

    MissingFolder where none is there, with a folder of a similar name. `where` names the option.
    """
    candidates = [root / folder for folder in ([folders] if isinstance(folders, str) else folders)]
    for folder in candidates:
        if folder.is_dir():
            if files := list_files(folder, EXTENSIONS):
                return folder, files
            raise InputError(f"{where}: no images in {folder}, expected {', '.join(sorted(EXTENSIONS))}")
    there = [path for folder in candidates if folder.parent.is_dir()
             for path in folder.parent.iterdir() if path.is_dir()]
    hint = next(filter(None, (did_you_mean(folder, there) for folder in candidates)), "")
    raise MissingFolder(f"{where}: no folder {', nor '.join(map(str, candidates))}{hint}")


def listed_files(name: str, root: Path, folder: Path, files: list[Path],
                 where: str) -> tuple[list[Path], str]:
    """The files of a folder that a list below root names, in its order; what is wrong if some are not there.

    A text file, one name a line, relative to the folder or to the one above it (as in PromptIR's lists); of a
    line that is no name, what follows the first blank is not read. InputError where a name is listed twice.
    """
    path = root / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"{where}: {name} leads out of root {root}, expected a file below it")
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
    listed = [known[name] for name in names if name in known]
    if twice := [str(file) for file, times in Counter(listed).items() if times > 1]:
        raise InputError(f"{where}: {path} lists {first_few(twice)} more than once")
    absent = [name for name in names if name not in known]
    there = [file.relative_to(folder) for file in set(files) - set(listed)]
    missing = first_few(f"{name}{did_you_mean(name, there)}" for name in absent[:4])
    problem = f"{where}: {len(absent)} of {len(names)} names in {path} are not in {folder}: {missing}"
    return listed, problem if absent else ""


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
