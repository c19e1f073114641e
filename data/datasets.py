"""Sources and test sets: pairs of degraded and clean images, or clean images that are degraded on the fly.

What is wrong with a set is one InputError.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from data.degradations import DEGRADATIONS
from data.files import LAYOUTS, MissingFolder, Pair, find_folder, find_images, match_pairs, near_miss, read_file_list
from data.transforms import random_crop, random_dihedral
from utils.errors import InputError, first_few
from utils.files import inside_root, write_atomically, write_text
from utils.images import read_image

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
        self.files = sorted({*(clean or []), *(degraded or [])})
        self.unused_clean = len(set(clean or []) - {pair.clean for pair in self.pairs})
        if self.problems and strict:
            raise InputError(self.problems[0])

    def __len__(self) -> int:
        return len(self.pairs)

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
            found += f", {self.options.degradation} {', '.join(f'{level:g}' for level in self.options.levels)} on the fly"
        if self.options.expected and len(self) != self.options.expected:
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

    def degrade(self, image: np.ndarray, level: float, rng: np.random.Generator, depth: np.ndarray | None = None) -> np.ndarray:
        """The set's degradation on top of an image, both [H,W,3] uint8."""
        return DEGRADATIONS[self.options.degradation](image, level, rng, depth)


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
    paths = sorted({path for images in sets for pair in images.pairs for path in (pair.degraded, pair.clean) if path})
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

    Returns degraded and clean [patch,patch,3] uint8, as they go to the device (data.transforms.to_batch), and the source's index.
    """

    def __init__(self, sources: list[ImageSet], repeats: list[int], seed: int, cache: DecodedImages | None = None) -> None:
        self.sources, self.seed, self.reading = sources, seed, Reading()
        self.cache = cache or {}
        self.samples_per_epoch = [len(images) * repeat for images, repeat in zip(sources, repeats)]     # N_k
        self.ends = np.cumsum(self.samples_per_epoch)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def place(self, index: int) -> tuple[int, int]:
        """The number of an index's source, and that of its image there: each is listed `repeat` times an epoch."""
        source = int(np.searchsorted(self.ends, index, side="right"))
        return source, index % len(self.sources[source])

    def files(self, index: int) -> tuple[str, Path | None, Path | None]:
        """An index's source by name, its degraded and its clean file."""
        source, image = self.place(index)
        pair = self.sources[source].pairs[image]
        return self.sources[source].name, pair.degraded, pair.clean

    def read(self, path: Path) -> np.ndarray:
        self.reading.note(path)
        return self.cache[path] if path in self.cache else read_image(path)

    def __getitem__(self, request: tuple[int, int, int]) -> tuple[Tensor, Tensor, int]:
        index, position, patch = request
        rng = np.random.default_rng([self.seed, 0, position])
        source, number = self.place(index)
        images = self.sources[source]
        on_disk = [image for image in images.read(number, self.read) if image is not None]
        patches = random_dihedral(random_crop(on_disk, patch, rng), rng)
        degraded, clean = patches[0], patches[-1]
        if images.options.degradation:
            degraded = images.degrade(degraded, rng.choice(images.options.levels), rng)
        degraded, clean = (torch.from_numpy(np.array(image, order="C")) for image in (degraded, clean))
        return degraded, clean, source


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
