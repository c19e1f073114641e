"""Sources and test sets: pairs of degraded and clean images, or clean images that are degraded on the fly.

What is wrong with a set is raised as one InputError.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from data import degradations
from data.drawings import clean_pair, darker
from data.pairs import Folder, Pair, composed, find_images, match_pairs, places
from data.transforms import random_crop, random_dihedral
from utils.errors import InputError
from utils.images import read_image
from utils.options import Images, Options, TestSet

BUNDLED = Path(skimage.data.__file__).parent                    # the photographs that scikit-image ships
NONE = -1                       # source of a clean input, which belongs to none
LIGHT_NOISE = (0, 4)            # stops of the camera's noise on top of the other degradations
DARKER = 2.5                    # dark and dim scenes, where tones stay, for each clean input


def bundled_depth(name: str) -> np.ndarray | None:
    """Depth in [0, 1] of a bundled photograph, [H,W], from its stereo pair's disparities (1 = farthest)."""
    if name != "motorcycle_left.png":
        return None
    disparity = np.load(BUNDLED / "motorcycle_disp.npz")["arr_0"].astype(np.float64)
    known = np.isfinite(disparity) & (disparity > 0)
    depth = 1 / np.where(known, disparity, disparity[known].min())
    return depth / depth.max()


def unequal(pair: Pair, degraded: Sequence[int], clean: Sequence[int]) -> str:
    """What is wrong with a pair whose images have those shapes [H,W,3], if they differ."""
    sizes = [f"{width}x{height}" for height, width, _ in (degraded, clean)]
    return (f"{pair.degraded} is {sizes[0]} but {pair.clean} is {sizes[1]}, expected the same size"
            if sizes[0] != sizes[1] else "")


class ImageSet:
    """The images of a source or of a test set, as an option file describes them (utils.options.Images).

    Args:
        options: folders, pairing and degradation of the set.
        root: folder that relative folders are below.
        where: name of the set's entry in the option file, for errors.

    complete: number of images before some are held out. cache: decoded images, by file.
    """

    def __init__(self, options: Images, root: str, where: str) -> None:
        self.name, self.options, self.root, self.where = options.name, options, Path(root), where
        self.cache: Mapping[Path, np.ndarray] = {}
        degraded, clean = self._find_bundled() if options.bundled else map(self._find, ("degraded", "clean"))
        self.folder = (degraded or clean).path                  # names the images
        self.paired = bool(degraded and clean)                  # both sides of each image are on disk
        if self.paired:
            self.pairs = match_pairs(degraded, clean, options.pairing, where)
        else:
            self.pairs = ([Pair(path, None) for path in degraded.files] if degraded
                          else [Pair(None, path) for path in clean.files])
        self.complete = len(self.pairs)
        names = (self.name_of(index).as_posix() for index in range(len(self)))
        self.pairs = self._held(self.pairs, names, "holdout")[:getattr(options, "limit", 0) or None]
        layers = self._find("layers")
        files = layers.files if layers else []
        self.layers = self._held(files, (path.name for path in files), "holdout_layers")
        photographs = Folder((clean or degraded).path, [pair.clean or pair.degraded for pair in self.pairs])
        depth = self._find("depth")
        self.depths = dict(match_pairs(photographs, depth, "same", f"{where}.depth")) if depth else {}

    def _find_bundled(self) -> tuple[Folder | None, Folder | None]:
        """Degraded and clean photographs of scikit-image: clean where a degradation is made of them."""
        folder = Folder(BUNDLED, [BUNDLED / name for name in self.options.bundled])
        for path in folder.files:
            if path.parent != folder.path or not path.is_file():
                raise InputError(f"{self.where}.bundled: scikit-image ships no {path.name}")
        return (None, folder) if self.options.degradation else (folder, None)

    def _find(self, option: str) -> Folder | None:
        """The images of the folder that an option names, None where it names none."""
        folders = getattr(self.options, option)
        return find_images(self.root, folders, f"{self.where}.{option}") if folders else None

    def _held(self, entries: list, names: Iterable[str], option: str) -> list:
        """Entries without those that an option's patterns, if any, name, or, in a test set, these alone."""
        patterns, testing = getattr(self.options, option), isinstance(self.options, TestSet)
        if not patterns:
            return entries
        held = [any(fnmatch(composed(name), composed(pattern)) for pattern in patterns) for name in names]
        kept = [entry for entry, out in zip(entries, held, strict=True) if out == testing]
        if not any(held) or not kept:
            found = "leaves none" if any(held) else "names none"
            raise InputError(f"{self.where}.{option}: {', '.join(patterns)} {found} of {len(held)} images")
        return kept

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def files(self) -> list[Path]:
        """The files that the set reads, each once."""
        sides = [path for pair in self.pairs for path in (pair.degraded, pair.clean) if path]
        return list(dict.fromkeys([*sides, *self.layers, *self.depths.values()]))

    def name_of(self, index: int) -> Path:
        """An image's path below the set's folder."""
        return self.pairs[index].path.relative_to(self.folder)

    def describe(self) -> str:
        """What was found, in one line."""
        options = self.options
        kind = "pairs" if self.paired else "images" if self.pairs[0].degraded else "clean images"
        found = f"{len(self)} {kind} {'of scikit-image' if options.bundled else f'in {self.folder}'}"
        if options.degradation:
            strengths = (", ".join(f"{level:g}" for level in options.levels)
                         or " to ".join(f"{end:g}" for end in options.range))
            found += f", {f'{options.degradation} {strengths}'.strip()} on the fly"
        incomplete = options.expected and self.complete != options.expected
        return found + f" (the complete set has {options.expected})" * bool(incomplete)

    def image(self, path: Path) -> np.ndarray:
        """[H,W,3] uint8."""
        return self.cache[path] if path in self.cache else read_image(path)

    def read(self, index: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        """The degraded and the clean image of a pair, [H,W,3] uint8, None for one that is not on disk."""
        pair = self.pairs[index]
        degraded, clean = (self.image(path) if path else None for path in pair)
        if self.paired and (problem := unequal(pair, degraded.shape, clean.shape)):
            raise InputError(problem)
        return degraded, clean

    def depth(self, index: int, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray | None:
        """Depth [H,W] in [0, 1] of a photograph, where the degradation needs one: recorded, or random."""
        pair = self.pairs[index]
        if self.options.degradation not in degradations.OF_DEPTH:
            return None
        if self.options.bundled and (depth := bundled_depth(pair.path.name)) is not None:
            return depth
        place = self.depths.get(pair.clean or pair.degraded)
        if not place:
            return degradations.smooth_field(shape, rng)
        recorded = Image.fromarray(self.image(place)[..., 0])
        return np.asarray(recorded.resize(shape[::-1], Image.Resampling.BILINEAR)) / np.float32(255)

    def degrade(self, image: np.ndarray, strength: float, rng: np.random.Generator,
                depth: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """The set's degradation of an image [H,W,3] uint8, and what of it is to be restored."""
        parts = degradations.Parts(depth, self.draw_layer if self.layers else None, self.options.airlight)
        return degradations.DEGRADATIONS[self.options.degradation](image, strength, rng, parts)

    def draw_strength(self, rng: np.random.Generator) -> float:
        """One of the options' levels, or a strength between the ends of their range."""
        options = self.options
        return float(rng.choice(options.levels)) if options.levels else rng.uniform(*options.range or (0, 0))

    def degraded_and_clean(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """A test image and its ground truth, [H,W,3] uint8; degraded as a whole, seeded by its name."""
        degraded, clean = self.read(index)
        options = self.options
        if options.degradation:
            level = options.levels[0] if options.levels else 0
            rng = degradations.file_rng(composed(self.pairs[index].path.name), level)
            image, made = (clean, True) if degraded is None else (degraded, False)
            depth = self.depth(index, image.shape[:2], rng)
            degraded, target = self.degrade(image, level or self.draw_strength(rng), rng, depth)
            clean = target if made else clean
        top, left = options.offset
        return degraded[top:, left:], None if clean is None else clean[top:, left:]

    def draw_layer(self, rng: np.random.Generator) -> np.ndarray:
        """One of the recorded rain layers, [h,w] uint8."""
        return self.image(self.layers[rng.integers(len(self.layers))])[..., 0]


def open_sets(listed: Sequence[Images], options: Options, name: str, log: Callable[[str], None] = print,
              problems: list[str] | None = None) -> list[ImageSet]:
    """The sources or test sets of the list `name` in the options; absent optional ones are reported.

    problems: gets a line for each set that is wrong. Without, the first is an InputError.
    """
    sets, root = [], options.root
    for i, one in enumerate(listed):
        try:
            sets.append(ImageSet(one, root, f"{options.file}: {name}[{i}] {one.name}"))
        except InputError as error:
            there = any(place.is_dir() for place in places(Path(root), one.degraded or one.clean))
            if not there and getattr(one, "optional", False):
                log(f"left out (optional): {error}")
            elif problems is None:
                raise
            else:
                problems.append(str(error))
    return sets


class TrainingSet(Dataset):
    """Random patches of all sources, in their order: an epoch lists each source's images `repeat` times.

    An item is requested as (index, position, patch): the place in the epoch's list, the running number of the
    sample in the training run, from which with `seed` all its randomness comes, and the patch size in pixels.

    Args:
        entries: the sources' image sets; those of the same name are one source.
        clean_share: share of the samples whose input is clean, some of them drawn (data.drawings). Where a
            degradation of clean images leaves the tones alone, DARKER times as many scenes are dark or dim.
        camera_share: share of the others, but those of degradation noise and camera, whose input gets a
            camera's noise (data.degradations.camera_noise): without it, the smoothness of haze and low light
            made of clean images tells them from photographs, and a network restores only those.

    Returns degraded and clean [patch,patch,3] uint8 (data.transforms.to_batch) and the source's index, NONE
    for a clean input.
    """

    def __init__(self, entries: list[ImageSet], seed: int, cache: Mapping[Path, np.ndarray] | None = None,
                 clean_share: float = 0.0, camera_share: float = 0.0) -> None:
        self.seed, self.clean_share, self.camera_share = seed, clean_share, camera_share
        self.names = list(dict.fromkeys(images.name for images in entries))
        # Those of one source follow each other.
        self.entries = sorted(entries, key=lambda images: self.names.index(images.name))
        self.source_of = [self.names.index(images.name) for images in self.entries]
        for images in self.entries:
            images.cache = cache or {}
        samples = [len(images) * images.options.repeat for images in self.entries]
        self.ends = np.cumsum(samples)
        self.samples_per_epoch = np.bincount(self.source_of, samples).astype(int).tolist()              # N_k

    def __len__(self) -> int:
        return int(self.ends[-1])

    def describe(self, lambdas: Sequence[float]) -> list[str]:
        """What each entry holds, a line each, with its source's weight lambda_k."""
        return [f"source {self.names[source]}: {images.describe()}; x {images.options.repeat} = "
                f"{len(images) * images.options.repeat} samples an epoch, lambda {lambdas[source]:.4f}"
                for images, source in zip(self.entries, self.source_of, strict=True)]

    def __getitem__(self, request: tuple[int, int, int]) -> tuple[Tensor, Tensor, int]:
        index, position, patch = request
        rng = np.random.default_rng([self.seed, 0, position])
        entry = int(np.searchsorted(self.ends, index, side="right"))
        images = self.entries[entry]
        number = index % len(images)            # each equally often, wherever the entry's part begins
        clean_input = rng.random() < self.clean_share
        if clean_input:
            clean = images.image(images.pairs[number].clean)
            degraded, clean = clean_pair(random_dihedral(random_crop([clean], patch, rng), rng)[0], rng)
        else:
            degraded, clean = self.degraded_pair(images, number, patch, rng)
        degraded, clean = (torch.from_numpy(np.array(image, order="C")) for image in (degraded, clean))
        return degraded, clean, NONE if clean_input else self.source_of[entry]

    def degraded_pair(self, images: ImageSet, number: int, patch: int,
                      rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Degraded and clean patch of an image, the degradation drawn where it is not on disk.

        Structure of a photograph's scale, its depth, is drawn for the photograph and cut. A larger window is
        degraded, of which the patch is a random part: JPEG's grid lies anywhere, no edge is near. What a
        camera sees is enlarged by up to 3: at full size, photographs are soft.
        """
        options, kind = images.options, images.options.degradation
        border = degradations.reach(kind, max([0, *options.levels, *options.range]))
        on_top = kind not in ("noise", "camera") and rng.random() < self.camera_share
        window = patch + 2 * border + degradations.GRID * (on_top or kind in degradations.OF_GRID)
        window *= 2 if kind == "camera" else 1                  # which may shrink what it gets
        degraded, clean = images.read(number)
        planes = [degraded, clean, images.depth(number, clean.shape[:2], rng)]
        there = [plane is not None for plane in planes]
        part = round(window / max(1, rng.uniform(0, 3))) if kind == "camera" else window
        cut = iter(random_dihedral(random_crop([p for p in planes if p is not None], part, rng), rng))
        degraded, clean, depth = (next(cut) if is_there else None for is_there in there)
        if part < window:
            clean = np.asarray(Image.fromarray(clean).resize((window, window), Image.Resampling.BICUBIC))
        tones_stay = not images.paired and kind not in degradations.OF_TONES
        if tones_stay and rng.random() < DARKER * self.clean_share:
            clean = darker(clean, rng)
        if kind:
            image = degraded if images.paired else clean
            degraded, target = images.degrade(image, images.draw_strength(rng), rng, depth)
            clean = clean if images.paired else target
        if on_top:
            degraded = degradations.camera_noise(degraded, rng.uniform(*LIGHT_NOISE), rng)
        height, width = clean.shape[:2]
        inner = slice(border, height - border), slice(border, width - border)
        return tuple(random_crop([degraded[inner], clean[inner]], patch, rng))
