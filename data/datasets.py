"""Sources and test sets: pairs of degraded and clean images, or clean images that are degraded on the fly.

What is wrong with a set is one InputError.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from data.degradations import BY_LEVEL, BY_RANGE, MARGINED, Parts, plain_patch
from data.files import LAYOUTS, MissingFolder, Pair, find_folder, find_images, match_pairs, near_miss, read_file_list
from data.transforms import random_crop, random_dihedral
from utils.errors import InputError, first_few
from utils.files import inside_root, write_atomically, write_text
from utils.images import read_image
from utils.options import TestSet

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


class ImageSet:
    """The images of a source or of a test set, as an option file describes them (utils.options.Images).

    Args:
        options: folders, pairing and degradation of the set.
        root: folder that relative folders are below.
        where: name of the set's entry in the option file, for errors.
        strict: a missing file or partner is an InputError; else it is in `problems`, and the set holds the rest.
    """

    def __init__(self, options, root: str, where: str, strict: bool = True) -> None:
        self.name, self.options, self.problems = options.name, options, []
        layout = LAYOUTS.get(options.type, {})
        clean_folder = options.clean or (layout.get("clean") if not options.degraded else None)
        degraded_folder = options.degraded or layout.get("degraded")
        clean = degraded = self.folder = self.clean_folder = None
        below = None if options.outside_root else Path(root)
        if options.bundled:
            self.folder = bundled_folder()
            clean = [self.folder / name for name in options.bundled]
            for path in clean:
                if path.parent != self.folder or not path.is_file():
                    raise InputError(f"{where}.bundled: scikit-image ships no {path.name}")
            if not options.degradation:
                clean, degraded = None, clean
        else:
            if degraded_folder:
                self.folder = find_folder(root, degraded_folder, f"{where}.degraded", options.outside_root)     # names the images
                degraded = find_images(self.folder, f"{where}.degraded", below)
            if clean_folder:
                try:
                    self.clean_folder = find_folder(root, clean_folder, f"{where}.clean", options.outside_root)
                except MissingFolder as error:
                    raise InputError(str(error)) if degraded else error     # degraded images alone are no absent set
                self.folder = self.folder or self.clean_folder
                clean = find_images(self.clean_folder, f"{where}.clean", below)
            if options.file_list:
                inside_root(Path(root) / options.file_list, below, f"{where}.file_list: ")
                files = degraded or clean
                listed, absent = read_file_list(Path(root) / options.file_list, self.folder, files, f"{where}.file_list")
                if absent:
                    names = [file.relative_to(self.folder).as_posix() for file in files]
                    self.problems.append(f"{where}.file_list: {len(absent)} of {len(listed) + len(absent)} names in {Path(root) / options.file_list} "
                                         f"are not in {self.folder}: {first_few(f'{name}{near_miss(name, names)}' for name in absent)}")
                degraded, clean = (listed, clean) if degraded else (None, listed)
        if clean and degraded:
            matching = match_pairs(degraded, clean, options.pairing, self.folder, self.clean_folder)
            self.pairs = matching.pairs
            if matching.unpaired:
                names = [path.name for path in clean]
                missing = (f"{path} (expected {wanted}.*{near_miss(f'{wanted.name}.*', names)})" for path, wanted in matching.unpaired)
                self.problems.append(f"{where}: {len(matching.unpaired)} of {len(degraded)} degraded images have no clean partner: {first_few(missing)}")
            for path, one, other in matching.ambiguous:
                self.problems.append(f"{where}: {one} and {other} have the same name, expected one clean image for {path}")
        else:
            self.pairs = [Pair(path, None) for path in degraded or []] or [Pair(None, path) for path in clean or []]
        self.paired = bool(clean and degraded)
        self.complete = len(self.pairs)                         # before some are held out
        if options.holdout:
            held = [any(fnmatch(pair.path.relative_to(self.folder).as_posix(), pattern) for pattern in options.holdout) for pair in self.pairs]
            if not any(held):
                raise InputError(f"{where}.holdout: {', '.join(options.holdout)} names no image in {self.folder}")
            testing = isinstance(options, TestSet)              # made of the images that a source leaves out
            self.pairs = [pair for pair, out in zip(self.pairs, held) if out == testing]
            if not self.pairs:
                raise InputError(f"{where}.holdout: {', '.join(options.holdout)} leaves no image of {self.folder}")
        self.layers, self.depths = self._find_parts(root, where)
        self.files = sorted({*(clean or []), *(degraded or []), *self.layers, *self.depths.values()})
        self.unused_clean = 0 if options.holdout else len(set(clean or []) - {pair.clean for pair in self.pairs})
        if self.problems and strict:
            raise InputError(self.problems[0])

    def _find_parts(self, root: str, where: str) -> tuple[list[Path], dict[Path, Path]]:
        """Rain layers, and the depth image of each clean one: recorded parts of the degradation."""
        layers, depths = [], {}
        if self.options.layers:
            layers = find_images(find_folder(root, self.options.layers, f"{where}.layers"), f"{where}.layers")
        if self.options.depth:
            folder = find_folder(root, self.options.depth, f"{where}.depth")
            by_stem = {path.stem: path for path in find_images(folder, f"{where}.depth")}
            depths = {pair.clean: by_stem[pair.clean.stem] for pair in self.pairs if pair.clean.stem in by_stem}
            if absent := [str(pair.clean) for pair in self.pairs if pair.clean not in depths]:
                self.problems.append(f"{where}.depth: {folder} has none for {len(absent)} of {len(self)} images: {first_few(absent)}")
        return layers, depths

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def used_files(self) -> list[Path]:
        """The files that the set reads: less than `files` where a folder holds more."""
        sides = [path for pair in self.pairs for path in (pair.degraded, pair.clean) if path]
        return [*sides, *self.layers, *self.depths.values()]

    @property
    def selected(self) -> int:
        """Images that a test of the set restores: all, or its option `limit`."""
        return min(getattr(self.options, "limit", 0) or len(self), len(self))

    def name_of(self, index: int) -> Path:
        """An image's path below the set's folder."""
        return self.pairs[index].path.relative_to(self.folder)

    def describe(self) -> str:
        """What was found, in one line."""
        if self.paired:
            found = f"{len(self)} pairs, {self.folder} -> {self.clean_folder}"
        else:
            kind = "images" if any(pair.degraded for pair in self.pairs) else "clean images"
            found = f"{len(self)} {kind} {'of scikit-image' if self.options.bundled else f'in {self.folder}'}"
        if self.options.degradation:
            strengths = ", ".join(f"{level:g}" for level in self.options.levels) or " to ".join(f"{end:g}" for end in self.options.range)
            parts = [f"{len(self.layers)} layers"] * bool(self.layers) + ["recorded depth"] * bool(self.depths)
            found += f", {' '.join([self.options.degradation, strengths]).strip()} on the fly" + "".join(f", {part}" for part in parts)
        if self.options.expected and self.complete != self.options.expected:
            found += f" (the complete set has {self.options.expected})"
        return found + (f" ({self.unused_clean} clean images without a degraded one)" if self.unused_clean else "")

    def read(self, index: int, read: Callable[[Path], np.ndarray] = read_image) -> tuple[np.ndarray | None, np.ndarray | None]:
        """The degraded and the clean image of a pair, [H,W,3] uint8, None for one that is not on disk."""
        pair = self.pairs[index]
        degraded, clean = (read(path) if path else None for path in (pair.degraded, pair.clean))
        if degraded is not None and clean is not None and degraded.shape != clean.shape:
            sizes = [f"{image.shape[1]}x{image.shape[0]}" for image in (degraded, clean)]
            raise InputError(f"{pair.degraded} is {sizes[0]} but {pair.clean} is {sizes[1]}, expected the same size")
        return degraded, clean

    def read_depth(self, index: int, read: Callable[[Path], np.ndarray] = read_image) -> np.ndarray | None:
        """The depth of a clean image [H,W] uint8, resized to it bilinearly, None where none was recorded."""
        path = self.depths.get(self.pairs[index].clean)
        if not path:
            return None
        height, width = read(self.pairs[index].clean).shape[:2]
        return np.asarray(Image.fromarray(read(path)[..., 0]).resize((width, height), Image.Resampling.BILINEAR))

    def degrade(self, image: np.ndarray, rng: np.random.Generator, level: float = 0, depth: np.ndarray | None = None,
                read: Callable[[Path], np.ndarray] = read_image) -> np.ndarray:
        """The set's degradation on top of an image, both [H,W,3] uint8: of strength `level`, or one drawn from its range.

        depth: [H,W] in [0, 1]. read: of the rain layers.
        """
        options = self.options
        if level:
            return BY_LEVEL[options.degradation](image, level, rng, depth)
        strength = rng.uniform(*options.range) if options.range else 0.0
        layers = Layers(self.layers, read)
        return BY_RANGE[options.degradation](image, strength, rng, Parts(depth, layers, tuple(options.airlight)))

    @property
    def margin(self) -> int:
        """Pixels around a patch that the degradation looks at."""
        return math.ceil(max(self.options.range)) if self.options.degradation in MARGINED and self.options.range else 0


class Layers(Sequence):
    """Rain layers, [h,w] uint8 each, read when they are asked for."""

    def __init__(self, paths: Sequence[Path], read: Callable[[Path], np.ndarray]) -> None:
        self.paths, self.read = paths, read

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.read(self.paths[index])[..., 0]


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
    if options and not sets:
        raise InputError(f"{where}: none of them is there, root {root}; set root=PATH")
    return sets


class DecodedImages:
    """Images by path, [H,W,3] uint8, decoded one after the other in a file that each process and worker maps for itself."""

    def __init__(self, file: Path, shapes: dict[Path, Sequence[int]]) -> None:
        self.file, self.shapes = file, shapes
        self.starts = dict(zip(shapes, np.cumsum([0, *map(math.prod, shapes.values())]).tolist()))
        self.pixels = np.memmap(file, np.uint8, mode="r")

    def __contains__(self, path: Path) -> bool:
        return path in self.shapes

    def __getitem__(self, path: Path) -> np.ndarray:
        start, shape = self.starts[path], self.shapes[path]
        return self.pixels[start:start + math.prod(shape)].reshape(shape)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "pixels": None}                # a worker that is not forked would get a copy

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = {**state, "pixels": np.memmap(state["file"], np.uint8, mode="r")}


def decode_all(sets: Sequence[ImageSet], progress: Callable, file: Path) -> DecodedImages:
    """Every image of some sets, decoded into one memory-mapped file that processes and workers share.

    A file that an earlier run left is used again where it holds the same images. InputError at the first unreadable one.
    `progress` wraps the iterator of images: progress(images, total).
    """
    paths = sorted({path for images in sets for path in images.used_files})
    stamps = [[str(path), path.stat().st_mtime_ns, path.stat().st_size] for path in paths]
    index = file.with_suffix(".json")
    known = json.loads(index.read_text(encoding="utf-8")) if index.exists() and file.exists() else {}
    if known.get("files") != stamps:
        shapes = []

        def write(temporary: str) -> None:
            with open(temporary, "wb") as target, ThreadPoolExecutor() as pool:
                batches = (paths[start:start + 64] for start in range(0, len(paths), 64))            # never all of them in memory
                for image in progress((image for batch in batches for image in pool.map(read_image, batch)), len(paths)):
                    target.write(image.tobytes())
                    shapes.append(image.shape)

        index.unlink(missing_ok=True)
        write_atomically(file, write)
        known = {"files": stamps, "shapes": shapes}
        write_text(index, json.dumps(known))
    return DecodedImages(file, dict(zip(paths, known["shapes"])))


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

    Args:
        entries: the sources' image sets; those whose options give the same `source` are one source.
        clean_share: share of the samples whose input is clean, a quarter of them plain colours.

    Returns degraded and clean [patch,patch,3] uint8, as they go to the device (data.transforms.to_batch), and the source's index.
    """

    def __init__(self, entries: list[ImageSet], repeats: list[int], seed: int, cache: DecodedImages | None = None,
                 clean_share: float = 0.0) -> None:
        self.seed, self.reading, self.clean_share = seed, Reading(), clean_share
        self.cache = cache or {}
        sources = list(dict.fromkeys(images.options.source or images for images in entries))
        parts = sorted(zip(entries, repeats), key=lambda part: sources.index(part[0].options.source or part[0]))
        self.entries = [images for images, _ in parts]          # those of one source follow each other
        self.source_of = [sources.index(images.options.source or images) for images in self.entries]
        self.names = [source if isinstance(source, str) else source.name for source in sources]
        samples = [len(images) * repeat for images, repeat in parts]
        self.ends = np.cumsum(samples)
        self.samples_per_epoch = np.bincount(self.source_of, samples).astype(int).tolist()              # N_k

    def __len__(self) -> int:
        return int(self.ends[-1])

    def place(self, index: int) -> tuple[int, int]:
        """The number of an index's entry, and that of its image there: each is listed `repeat` times an epoch."""
        entry = int(np.searchsorted(self.ends, index, side="right"))
        return entry, index % len(self.entries[entry])

    def files(self, index: int) -> tuple[str, Path | None, Path | None]:
        """An index's source by name, its degraded and its clean file."""
        entry, image = self.place(index)
        pair = self.entries[entry].pairs[image]
        return self.names[self.source_of[entry]], pair.degraded, pair.clean

    def read(self, path: Path) -> np.ndarray:
        self.reading.note(path)
        return self.cache[path] if path in self.cache else read_image(path)

    def __getitem__(self, request: tuple[int, int, int]) -> tuple[Tensor, Tensor, int]:
        index, position, patch = request
        rng = np.random.default_rng([self.seed, 0, position])
        entry, number = self.place(index)
        images = self.entries[entry]
        if self.clean_share and rng.random() < self.clean_share:
            degraded = clean = self.clean_patch(images, number, patch, rng)
        else:
            degraded, clean = self.degraded_pair(images, number, patch, rng)
        degraded, clean = (torch.from_numpy(np.array(image, order="C")) for image in (degraded, clean))
        return degraded, clean, self.source_of[entry]

    def degraded_pair(self, images: ImageSet, number: int, patch: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Degraded and clean patch of an image, the degradation drawn where it is not on disk."""
        degraded, clean = images.read(number, self.read)
        planes = [plane for plane in (degraded, clean, images.read_depth(number, self.read)) if plane is not None]
        planes = random_dihedral(random_crop(planes, patch + 2 * images.margin, rng), rng)
        degraded, clean = planes[0], planes[int(images.paired)]
        if images.options.degradation:
            level = rng.choice(images.options.levels) if images.options.levels else 0
            depth = planes[-1] / np.float32(255) if images.depths else None
            degraded = images.degrade(degraded, rng, level, depth, self.read)
        inner = slice(images.margin, images.margin + patch)
        return degraded[inner, inner], clean[inner, inner]

    def clean_patch(self, images: ImageSet, number: int, patch: int, rng: np.random.Generator) -> np.ndarray:
        """A patch of an image's ground truth, every fourth time plain colours instead."""
        if rng.random() < 0.25:
            return plain_patch(patch, rng)
        return random_dihedral(random_crop([self.read(images.pairs[number].clean)], patch, rng), rng)[0]


class Reading:
    """Which file each DataLoader worker has read last, in memory that they share: known still when a worker has died."""

    def __init__(self, workers: int = 256) -> None:
        self.names = torch.zeros(workers, 4096, dtype=torch.uint8).share_memory_()
        self.workers = torch.zeros(workers, dtype=torch.int64).share_memory_()       # their process numbers

    def note(self, path: Path) -> None:
        worker = get_worker_info()
        if worker and worker.id < len(self.workers):
            name = os.fsencode(path)[:4095] + b"\0"
            self.names[worker.id, :len(name)] = torch.frombuffer(bytearray(name), dtype=torch.uint8)
            self.workers[worker.id] = os.getpid()

    def of(self, process: int) -> str:
        """The file that a worker with this process number has read last, "" where none is known."""
        for names, number in zip(self.names, self.workers.tolist()):
            if number == process:
                return os.fsdecode(bytes(names.tolist()).split(b"\0")[0])
        return ""


class EpochSampler(Sampler):
    """Batches of requests for TrainingSet, from any step on: the same samples whatever the workers and processes.

    The samples of an epoch are one group or, for balanced batches, one group for each source. Sample number n of the run is of
    group n mod G; the m-th sample of a group of N is entry m mod N of its m // N-th epoch's own permutation. A step takes the
    next batch * processes samples, process r the r-th part of them. Nothing needs saving to continue at step s.

    Args:
        groups: samples of each group, which lie one after the other in the training set.
        stages: [(first step, batch per process, patch)], the first from step 0.
    """

    def __init__(self, groups: Sequence[int], stages: Sequence[tuple[int, int, int]], steps: int, seed: int, start: int = 0,
                 rank: int = 0, processes: int = 1) -> None:
        self.groups, self.stages, self.steps, self.seed = list(groups), list(stages), steps, seed
        self.start, self.rank, self.processes = start, rank, processes

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        position, epochs, orders = 0, [-1] * len(self.groups), [np.empty(0)] * len(self.groups)
        starts = np.cumsum([0, *self.groups])
        for step in range(self.steps):
            batch, patch = next((b, p) for first, b, p in reversed(self.stages) if step >= first)
            positions = range(position + self.rank * batch, position + (self.rank + 1) * batch)
            position += batch * self.processes
            if step < self.start:
                continue
            requests = []
            for n in positions:
                m, group = divmod(n, len(self.groups))
                epoch, entry = divmod(m, self.groups[group])
                if epoch != epochs[group]:
                    epochs[group] = epoch
                    orders[group] = np.random.default_rng([self.seed, 1, epoch, group]).permutation(self.groups[group])
                requests.append((int(starts[group] + orders[group][entry]), n, patch))
            yield requests

    def of_step(self, step: int) -> Iterator[tuple[int, int, int]]:
        """The requests of one step, of all processes."""
        for rank in range(self.processes):
            yield from next(iter(EpochSampler(self.groups, self.stages, self.steps, self.seed, step, rank, self.processes)))

    def apart(self, rng: np.random.Generator, batch: int, patch: int) -> list[tuple[int, int, int]]:
        """A batch, drawn from the groups as those of the run, but at random and of patches that no step sees."""
        starts = np.cumsum([0, *self.groups])
        return [(int(starts[n % len(self.groups)] + rng.integers(self.groups[n % len(self.groups)])), 2**62 + int(rng.integers(2**62)), patch)
                for n in range(batch)]


def own_process_group(worker: int) -> None:
    """For a DataLoader's workers: Ctrl-C and signals to the group reach the main process alone, which saves and ends them."""
    if hasattr(os, "setpgid"):                                  # not on Windows
        os.setpgid(0, 0)
