"""Sources and test sets: pairs of degraded and clean images, or clean images that are degraded on the fly.

Pairs are made by key, never by position in two sorted lists. What is wrong with a folder is one InputError.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from data.degradations import DEGRADATIONS
from data.transforms import random_crop, random_dihedral, to_tensor
from utils.errors import InputError
from utils.images import EXTENSIONS, list_images, read_image

# Folders of the public data sets below the root, as users of PromptIR, AdaIR and BaryIR have them (METHOD section 4).
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


def bundled_folder() -> Path:
    """Folder of the photographs that scikit-image ships."""
    import skimage.data

    return Path(skimage.data.__file__).parent


def bundled_depth(name: str) -> np.ndarray | None:
    """Depth in [0, 1] of a bundled photograph, [H,W], from the disparities of its stereo pair (1 = farthest)."""
    if name != "motorcycle_left.png":
        return None
    disparity = np.load(bundled_folder() / "motorcycle_disp.npz")["arr_0"].astype(np.float64)
    known = np.isfinite(disparity) & (disparity > 0)
    depth = 1 / np.where(known, disparity, disparity[known].min())
    return depth / depth.max()


class MissingFolder(InputError):
    """A folder of an option file is absent."""


def find_images(folder: Path, where: str) -> list[Path]:
    """All images of a folder; InputError where it is absent or holds none. `where` names the option."""
    if not folder.is_dir():
        raise MissingFolder(f"{where}: no folder {folder}")
    files = list_images(folder)
    if not files:
        raise InputError(f"{where}: no images in {folder}, expected {', '.join(sorted(EXTENSIONS))}")
    return files


def make_pairs(degraded: list[Path], clean: list[Path], pairing: str, where: str, degraded_folder: Path, clean_folder: Path) -> list[Pair]:
    """Pair every degraded file with its clean one: by name, and by sub-folder, too, where the clean folder has any.

    `pairing` is a key of PAIRINGS, or auto: `same` if it finds any partner at all, else the rule that finds most. A degraded
    file without partner, and two clean files that fit equally, are InputErrors; clean files may be left over.
    """
    flat = all(path.parent == clean_folder for path in clean)

    def key(path: Path, folder: Path, rule: str = "same") -> Path:
        stem = PAIRINGS[rule](path.stem)
        return Path(stem) if flat else path.relative_to(folder).with_name(stem)

    by_key: dict[Path, list[Path]] = {}
    for path in clean:
        by_key.setdefault(key(path, clean_folder), []).append(path)

    def unpaired(rule: str) -> list[Path]:
        return [path for path in degraded if key(path, degraded_folder, rule) not in by_key]

    rule = pairing
    if pairing == "auto":
        rule = "same" if len(unpaired("same")) < len(degraded) else min(PAIRINGS, key=lambda rule: len(unpaired(rule)))
    if missing := unpaired(rule):
        raise InputError(
            f"{where}: {len(missing)} of {len(degraded)} degraded images have no clean partner, the first is {missing[0]}: "
            f"expected {key(missing[0], degraded_folder, rule)}.* below {clean_folder}"
        )
    pairs = []
    for path in degraded:
        partners = by_key[key(path, degraded_folder, rule)]
        partners = [p for p in partners if p.name == path.name] or partners
        if len(partners) > 1:
            raise InputError(f"{where}: {partners[0]} and {partners[1]} have the same name, expected one clean image for {path}")
        pairs.append(Pair(path, partners[0]))
    return pairs


class ImageSet:
    """The images of a source or of a test set, as an option file describes them (utils.options.Images).

    Args:
        options: folders, pairing and degradation of the set.
        root: folder that relative folders are below.
        where: name of the set's entry in the option file, for errors.
    """

    def __init__(self, options, root: str, where: str) -> None:
        self.name, self.options = options.name, options
        layout = LAYOUTS.get(options.type, {})
        clean_folder = options.clean or (layout.get("clean") if not options.degraded else None)
        degraded_folder = options.degraded or (layout.get("degraded") if not options.degradation else None)
        self.folder = bundled_folder() if options.bundled else Path(root) / (degraded_folder or clean_folder)     # names the images
        self.clean_folder = Path(root) / (clean_folder or "")
        clean = degraded = None
        if options.bundled:
            clean = [self.folder / name for name in options.bundled]
            for path in clean:
                if not path.is_file():
                    raise InputError(f"{where}.bundled: scikit-image ships no {path.name}")
            if not options.degradation:
                clean, degraded = None, clean
        else:
            if clean_folder:
                clean = find_images(self.clean_folder, f"{where}.clean")
            if degraded_folder:
                degraded = find_images(self.folder, f"{where}.degraded")
        if clean and degraded:
            self.pairs = make_pairs(degraded, clean, options.pairing, where, self.folder, self.clean_folder)
        else:
            self.pairs = [Pair(path, None) for path in degraded or []] or [Pair(None, path) for path in clean or []]
        self.unused_clean = len(set(clean or []) - {pair.clean for pair in self.pairs})

    def __len__(self) -> int:
        return len(self.pairs)

    def name_of(self, index: int) -> Path:
        """An image's path below the set's folder."""
        return self.pairs[index].path.relative_to(self.folder)

    def describe(self) -> str:
        """What was found, in one line."""
        first = self.pairs[0]
        if first.degraded and first.clean:
            found = f"{len(self)} pairs, {self.folder} -> {self.clean_folder}"
        else:
            found = f"{len(self)} {'images' if first.degraded else 'clean images'} {'of scikit-image' if self.options.bundled else f'in {self.folder}'}"
        if self.options.degradation:
            found += f", {self.options.degradation} {', '.join(f'{level:g}' for level in self.options.levels)} on the fly"
        return found + (f" ({self.unused_clean} clean images without a degraded one)" if self.unused_clean else "")

    def read(self, index: int, read: Callable[[Path], np.ndarray] = read_image) -> tuple[np.ndarray | None, np.ndarray | None]:
        """The degraded and the clean image of a pair, [H,W,3] uint8, None for one that is not on disk."""
        pair = self.pairs[index]
        degraded, clean = (read(path) if path else None for path in (pair.degraded, pair.clean))
        if degraded is not None and clean is not None and degraded.shape != clean.shape:
            sizes = [f"{image.shape[1]}x{image.shape[0]}" for image in (degraded, clean)]
            raise InputError(f"{pair.degraded} is {sizes[0]} but {pair.clean} is {sizes[1]}, expected the same size")
        return degraded, clean

    def degrade(self, clean: np.ndarray, level: float, rng: np.random.Generator, depth: np.ndarray | None = None) -> np.ndarray:
        """The set's degradation of a clean image, both [H,W,3] uint8."""
        return DEGRADATIONS[self.options.degradation](clean, level, rng, depth)


def open_test_sets(options: Sequence, root: str, where: str, report: Callable[[str], None]) -> list[ImageSet]:
    """The test sets of an option file's list `where`; one that is marked optional and is absent is reported and left out."""
    sets = []
    for i, images in enumerate(options):
        try:
            sets.append(ImageSet(images, root, f"{where}[{i}] {images.name}"))
        except MissingFolder as error:
            if not images.optional:
                raise InputError(f"{error}; put the data there, set root=PATH, or mark the set optional: true") from None
            report(f"left out (optional): {error}")
    return sets


def decode_all(sets: Sequence[ImageSet], progress: Callable) -> dict[Path, np.ndarray]:
    """Decode every file of some sets in parallel; the arrays by path. InputError at the first unreadable file.

    `progress` wraps the iterator of files: progress(files, total).
    """
    paths = sorted({path for images in sets for pair in images.pairs for path in (pair.degraded, pair.clean) if path})
    with ThreadPoolExecutor() as pool:
        return dict(zip(paths, progress(pool.map(read_image, paths), len(paths))))


def check_all(sets: Sequence[ImageSet], progress: Callable) -> None:
    """Decode every pair of some sets in parallel, keeping none; InputError at an unreadable file or unequal sizes."""
    def check(place: tuple[ImageSet, int]) -> None:
        place[0].read(place[1])

    places = [(images, index) for images in sets for index in range(len(images))]
    with ThreadPoolExecutor() as pool:
        for _ in progress(pool.map(check, places), len(places)):
            pass


class TrainingSet(Dataset):
    """Random patches of all sources, numbered by their order: an epoch lists each source's images `repeat` times.

    An item is requested as (index, position, patch): the place in the epoch's list, the running number of the sample in
    the training run, from which with `seed` all its randomness comes, and the patch size in pixels.

    Returns degraded and clean [3,patch,patch] in [0, 1], and the source's index.
    """

    def __init__(self, sources: list[ImageSet], repeats: list[int], seed: int, cache: dict[Path, np.ndarray] | None = None) -> None:
        self.sources, self.seed = sources, seed
        self.cache = cache or {}
        self.samples_per_epoch = [len(images) * repeat for images, repeat in zip(sources, repeats)]     # N_k
        self.ends = np.cumsum(self.samples_per_epoch)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, path: Path) -> np.ndarray:
        return self.cache[path] if path in self.cache else read_image(path)

    def __getitem__(self, request: tuple[int, int, int]) -> tuple[Tensor, Tensor, int]:
        index, position, patch = request
        rng = np.random.default_rng([self.seed, 0, position])
        source = int(np.searchsorted(self.ends, index, side="right"))
        images = self.sources[source]
        degraded, clean = images.read(index % len(images), self.read)        # each image `repeat` times an epoch
        if degraded is None:
            (clean,) = random_dihedral(random_crop([clean], patch, rng), rng)
            degraded = images.degrade(clean, rng.choice(images.options.levels), rng)
        else:
            degraded, clean = random_dihedral(random_crop([degraded, clean], patch, rng), rng)
        return to_tensor(degraded), to_tensor(clean), source


class EpochSampler(Sampler):
    """Batches of requests for TrainingSet, from any step on: the same samples whatever the workers and processes.

    Sample number n of the run is entry n mod N of the n // N-th epoch's own permutation. A step takes the next
    batch * processes samples, process r the r-th part of them. Nothing needs saving to continue at step s.

    Args:
        stages: [(first step, batch per process, patch)], the first from step 0.
    """

    def __init__(self, length: int, stages: Sequence[tuple[int, int, int]], steps: int, seed: int, start: int = 0,
                 rank: int = 0, processes: int = 1) -> None:
        self.length, self.stages, self.steps, self.seed = length, list(stages), steps, seed
        self.start, self.rank, self.processes = start, rank, processes

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        position, epoch, order = 0, -1, None
        for step in range(self.steps):
            batch, patch = next((b, p) for first, b, p in reversed(self.stages) if step >= first)
            positions = range(position + self.rank * batch, position + (self.rank + 1) * batch)
            position += batch * self.processes
            if step < self.start:
                continue
            requests = []
            for n in positions:
                if n // self.length != epoch:
                    epoch = n // self.length
                    order = np.random.default_rng([self.seed, 1, epoch]).permutation(self.length)
                requests.append((int(order[n % self.length]), n, patch))
            yield requests


def own_process_group(worker: int) -> None:
    """For a DataLoader's workers: Ctrl-C and signals to the group reach the main process alone, which saves and ends them."""
    os.setpgid(0, 0)
