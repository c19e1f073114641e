"""Pairs by name, what sets report and refuse, patches that repeat, what a patch gets, the sampler."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.faults import same_state
from conftest import folder_set, write_image
from data import degradations
from data.cache import decode_all
from data.datasets import NONE, ImageSet, TrainingSet
from data.degradations import DEGRADATIONS, Parts, jpeg
from data.pairs import Folder, match_pairs
from data.sampler import EpochSampler, probabilities
from data.transforms import random_crop, random_dihedral, to_batch
from utils import options
from utils.errors import InputError
from utils.images import read_image, to_tensor

CLEAN = dict(clean="clean", degradation="noise", levels=[25])


@pytest.fixture
def tree(tmp_path):
    """Clean photographs with degraded ones, depth at half their size, and rain layers."""
    for n in range(4):
        write_image(tmp_path / f"clean/{n}.png", 64, 48, seed=n)
        write_image(tmp_path / f"in/{n}.png", 64, 48, seed=n + 10)
    for folder, size, values in (("depth", (24, 32), (0, 60, 120, 180)), ("layers", (48, 64), (30, 50))):
        (tmp_path / folder).mkdir()
        for n, value in enumerate(values):
            Image.fromarray(np.full(size, value, np.uint8)).save(tmp_path / folder / f"{n}.png")
    return tmp_path


@pytest.fixture
def two_sources(tree) -> list[ImageSet]:
    return [folder_set(tree, clean="clean", degradation="noise", levels=[15, 50], repeat=2, name="noise"),
            folder_set(tree, degraded="in", clean="clean", repeat=5)]


def pairs_of(pairing: str, degraded: list[str], clean: list[str]) -> list[str]:
    sides = [Folder(Path(name), [Path(name, file) for file in files])
             for name, files in (("in", degraded), ("gt", clean))]
    pairs = match_pairs(*sides, pairing, "here")
    assert [str(pair.degraded.relative_to("in")) for pair in pairs] == degraded
    return [str(pair.clean.relative_to("gt")) for pair in pairs]


@pytest.mark.parametrize("pairing, degraded, clean", [
    ("same", ["b.png", "a.png"], ["b.jpg", "a.png"]),                                           # same stem
    ("same", ["a.png"], ["a.png", "a.jpg"]),                                        # the name before the stem
    *((rule, ["rain-10.png", "rain-2.png"], ["norain-10.png", "norain-2.png"]) for rule in ("rain", "auto")),
    ("haze", ["10_1_0.1.jpg", "1_1_0.2.jpg"], ["10.png", "1.png"]),
    ("o_haze", ["01_outdoor_hazy.jpg"], ["01_outdoor_GT.jpg"]), ("spa", ["000.png"], ["000gt.png"]),
    ("same", ["x/1.png", "y/1.png"], ["x/1.png", "y/1.png"]),                       # mirrored sub-folders
    ("haze", ["part1/1_a.jpg", "part4/2_a.jpg"], ["1.jpg", "2.jpg"]),               # sub-folders on one side
    # Packed on macOS, the other side on Linux: an accent is a character of its own, or not.
    ("same", ["Z\u00fcrich/caf\u00e9.png"], ["Zu\u0308rich/cafe\u0301.png"]),
])
def test_pairs_are_made_by_name(pairing, degraded, clean):
    """In whatever order and whatever else is there, also in either Unicode form."""
    assert pairs_of(pairing, degraded, ["0.png", *clean[::-1]]) == clean[:len(degraded)]


@pytest.mark.parametrize("pairing, degraded, clean, message", [
    ("same", ["a.png", "b.png"], ["a.png", "bc.png"],
     r"^here: 1 of 2 images .* partner: in/b.png \(expected gt/b\.\*, did you mean bc\?\)$"),
    ("auto", ["0001x2.png"], ["0001.png", "0002.png"], r"gt/0001x2\.\*, did you mean 0001\?\)$"),
    ("same", ["1_2.png"], ["1.png"], r"in/1_2.png \(expected gt/1_2\.\*"),
    ("same", ["x/1.png", "y/1.png"], ["x/1.png"], r"in/y/1.png \(expected gt/y/1\.\*"),          # not gt/x
    ("same", ["a.png"], ["a.bmp", "a.jpg"], "gt/a.bmp and gt/a.jpg have the same name, expected one"),
])
def test_a_missing_partner_and_two_of_them_are_errors(pairing, degraded, clean, message):
    with pytest.raises(InputError, match=message):
        pairs_of(pairing, degraded, clean)


HELD = dict(clean="clean", degradation="rain", range=[1, 1], layers="layers", holdout=["[13].png"],
            holdout_layers=["1*"])


@pytest.mark.parametrize("entry, message", [
    *((dict(bundled=[name], degradation="noise", levels=[25]), r"set.bundled: scikit-image ships no \w+")
      for name in ("../../README.md", "nothing.png")),                          # one leads out of the folder
    (dict(clean="clean", degradation="haze", range=[1, 2], depth="layers"),
     r"set.depth: 2 of 4 images have no partner: .*2\.png .*; .*3\.png"),
    (HELD | dict(holdout=["x*"]), r"set.holdout: x\* names none of 4"),
    (HELD | dict(holdout=["*"]), "leaves none of 4"),
    (HELD | dict(holdout_layers=["?.png"]), "set.holdout_layers: .* leaves none of 2"),
    (HELD | dict(layers="gone"), "set.layers: no folder .*gone; put the data there, or set root=PATH"),
    (dict(degraded="in", clean=["gone", "dept"]), "set.clean: no folder .*gone, nor .*dept, did you mean"),
    (dict(degraded="in", clean="empty"), "set.clean: no images in .*empty, expected .*.bmp"),
])
def test_sets_that_are_refused(tree, entry, message):
    (tree / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        folder_set(tree, **entry)


def test_test_images(tree):
    """Noise depends on a file's name alone and comes on top of a degraded image; an offset moves the grid."""
    degraded, clean = folder_set(tree, options.TestSet, **CLEAN, degraded="in").degraded_and_clean(1)
    noise = 25 * np.random.default_rng(zlib.crc32(b"1.png") + 25).standard_normal(clean.shape)
    by_hand = np.clip(read_image(tree / "in/1.png") + noise, 0, 255).astype(np.uint8)       # the field's way
    names = "\udce9.png", "\udce8.png"                          # of bytes that are no text
    assert len({degradations.file_rng(name, 25).random() for name in names}) == 2
    assert np.array_equal(degraded, by_hand) and np.array_equal(clean, read_image(tree / "clean/1.png"))
    image, clean = folder_set(tree, options.TestSet, clean="clean", degradation="jpeg", levels=[20],
                              offset=[3, 5]).degraded_and_clean(2)
    whole = read_image(tree / "clean/2.png")
    assert np.array_equal(clean, whole[3:, 5:]) and image.shape == (45, 59, 3)
    assert np.array_equal(image, jpeg(whole, 20, None, Parts())[0][3:, 5:])
    write_image(tree / "in/1.png", 65, 48)
    with pytest.raises(InputError, match="in/1.png is 65x48 but .*clean/1.png is 64x48, expected the same"):
        folder_set(tree, degraded="in", clean="clean").read(1)


def test_an_epoch_lists_images_repeat_times_and_parts_of_a_source_are_one(tree):
    entries = [folder_set(tree, **CLEAN, name="noise"),
               folder_set(tree, clean="clean", degradation="rain", range=[1, 2], name="rain", repeat=2),
               folder_set(tree, **{**CLEAN, "clean": "depth"}, name="noise", repeat=3)]
    training_set = TrainingSet(entries, seed=0)
    assert training_set.names == ["noise", "rain"] and training_set.samples_per_epoch == [16, 8]
    assert [images.folder.name for images in training_set.entries] == ["clean", "depth", "clean"]
    assert [training_set[(index, 0, 16)][2] for index in range(24)] == [0] * 16 + [1] * 8
    numbers, read = [], entries[2].read
    entries[2].read = lambda number: numbers.append(number) or read(number)
    assert all(training_set[(index, 0, 16)] for index in range(4, 16))
    assert sorted(numbers) == sorted(3 * [0, 1, 2, 3])


def test_patches_repeat_with_their_seed_workers_and_cache(tree, two_sources):
    plain, cached = (TrainingSet(two_sources, 7, decoded, clean_share=0.2, camera_share=0.2)
                     for decoded in (None, decode_all(two_sources)))

    def batches(dataset: TrainingSet, workers: int, start: int = 0) -> list:
        sampler = EpochSampler([len(dataset)], [(0, 4, 16), (8, 2, 24)], steps=12, seed=7, start=start)
        return list(DataLoader(dataset, batch_sampler=sampler, num_workers=workers))

    expected = batches(plain, 0)
    assert len(expected) == 12
    assert expected[0][0].shape == (4, 16, 16, 3) and expected[8][0].shape == (2, 24, 24, 3)
    for other in (batches(plain, 1), batches(cached, 0), batches(plain, 0, start=5)):
        assert same_state(other, expected[-len(other):])
    assert not torch.equal(expected[0][0], expected[1][0])


def test_depth_layers_and_degraded_images_come_from_disk(tree):
    haze = folder_set(tree, clean="clean", degradation="haze", range=[2, 2], airlight=[1, 1], depth="depth")
    rain, kept = folder_set(tree, **HELD), folder_set(tree, options.TestSet, **HELD)
    assert len(haze.files) == 4 + 4 and len(rain.files) == 2 + 1
    for images, names, layer in ((rain, ["0.png", "2.png"], 30), (kept, ["1.png", "3.png"], 50)):
        assert [pair.path.name for pair in images.pairs] == names           # what is held out, tests keep
        assert {images.draw_layer(np.random.default_rng(n)).max() for n in range(9)} == {layer}
    hazy, clean, _ = TrainingSet([haze], seed=0)[(2, 0, 32)]
    t = np.exp(-2 * 120 / 255)
    assert (hazy - (clean * t + 255 * (1 - t))).abs().max() <= 0.6
    for position in range(6):
        rainy, clean, _ = TrainingSet([rain], seed=0)[(0, position, 32)]
        assert torch.equal(rainy, (clean.int() + 30).clamp(max=255).byte())
    pairs = dict(degraded="in", clean="clean")
    sources = [folder_set(tree, **pairs, degradation="poisson", levels=[3000]), folder_set(tree, **pairs)]
    with_noise, plain = (TrainingSet([source], seed=0)[(0, 0, 32)] for source in sources)
    assert torch.equal(with_noise[1], plain[1])                 # the degradation comes on top
    assert 0 < (with_noise[0].float() - plain[0].float()).abs().mean() < 5


def test_random_depth_of_a_patch_is_a_cut_of_the_photographs(tmp_path):
    """Drawn for a patch, each would reach the horizon, 1. On black, haze of beta 1 is 255 (1 - exp(-d))."""
    Image.new("RGB", (256, 192)).save(tmp_path / "black.png")
    haze = folder_set(tmp_path, clean=".", degradation="haze", range=[1, 1], airlight=[1, 1])
    training_set = TrainingSet([haze], seed=0)
    depths = np.stack([-np.log(1 - training_set[(0, n, 32)][0].numpy() / 255) for n in range(60)])
    lows, highs = depths.min(axis=(1, 2, 3)), depths.max(axis=(1, 2, 3))
    assert (highs > 0.99).sum() < 15 and (highs - lows < 0.3).sum() > 30 and highs.max() > 3 * lows.min()


def test_a_blurred_patch_saw_what_lies_around_it(tree, monkeypatch):
    """A larger window is blurred, whose edges mirror it, and cut: by the blur's reach."""
    made, defocus = [], degradations.defocus
    monkeypatch.setitem(DEGRADATIONS, "defocus", lambda *given: made.append(defocus(*given)) or made[-1])
    images = folder_set(tree, clean="clean", degradation="defocus", range=[2, 2.5])
    patches = TrainingSet([images], seed=0)[(1, 7, 24)][:2]
    for window, patch in zip(made[0], patches, strict=True):
        assert window.shape == (30, 30, 3) and np.array_equal(window[3:-3, 3:-3], patch)


@pytest.mark.parametrize("entry, camera_share", [
    (dict(degradation="jpeg", levels=[1]), 0.0), (dict(degradation="gaussian_blur", levels=[1]), 0.999)])
def test_jpegs_grid_lies_anywhere_in_a_patch(tmp_path, monkeypatch, entry, camera_share):
    """At quality 1 blocks are flat: where columns and rows change, there is the grid."""
    monkeypatch.setattr(degradations, "stored", lambda photo, rng: jpeg(photo, 1, rng, Parts())[0])
    y, x = np.mgrid[:96, :96]
    ramps = (128 + 60 * np.sin((x + 2 * y) / 23) + 60 * np.sin((3 * x - y) / 31)).astype(np.uint8)
    Image.fromarray(ramps).convert("RGB").save(tmp_path / "ramps.png")
    training_set = TrainingSet([folder_set(tmp_path, clean=".", **entry)], 0, camera_share=camera_share)
    found = np.zeros((8, 8), int)
    for n in range(256):
        patch = training_set[(0, n, 24)][0].numpy()[..., 0].astype(int)
        steps = [np.abs(np.diff(patch, axis=axis)).sum(axis=1 - axis) for axis in (0, 1)]
        found[tuple(int(np.bincount((np.arange(23) + 1) % 8, side).argmax()) for side in steps)] += 1
    assert (found > 0).sum() >= 55 and found.max() <= 20        # 256 / 64 = 4 each; 8 are expected at 0, 0


def test_clean_inputs_are_of_no_source(tree):
    training_set = TrainingSet([folder_set(tree, **{**CLEAN, "levels": [50]})], seed=0, clean_share=0.3)
    samples = [training_set[(n % 4, n, 16)] for n in range(200)]
    noisy = {source: [not torch.equal(*pair) for *pair, its_source in samples if its_source == source]
             for source in (0, NONE)}
    assert all(noisy[0]) and 120 <= len(noisy[0]) <= 160 and len(noisy[0]) + len(noisy[NONE]) == 200
    assert 8 <= sum(noisy[NONE]) <= 28                          # black frames


def test_a_share_of_the_degraded_samples_gets_a_cameras_noise(tree):
    """Those of degradations that are noise themselves do not."""
    def changed(**entry) -> int:
        samples = [[TrainingSet([folder_set(tree, clean="clean", **entry)], 0, camera_share=share)[(0, n, 16)]
                    for n in range(60)] for share in (1e-9, 0.5)]
        assert all(side.shape == (16, 16, 3) for pair in samples[1] for side in pair[:2])   # some shrunk
        return sum(not torch.equal(plain[0], taken[0]) for plain, taken in zip(*samples, strict=True))

    assert 20 <= changed(degraded="in") <= 40 and 20 <= changed(degradation="lowlight", levels=[2]) <= 40
    assert changed(degradation="noise", levels=[25]) == changed(degradation="camera", levels=[2]) == 0


def test_scenes_are_darker_where_tones_stay_and_enlarged_before_a_camera(tree):
    def clean(kind: str) -> np.ndarray:
        images = folder_set(tree, clean="clean", degradation=kind, levels=[1])
        samples = [TrainingSet([images], 0, clean_share=0.08)[(0, n, 32)] for n in range(100)]
        return np.stack([target for _, target, source in samples if source != NONE]).astype(int)

    noise, haze, camera = map(clean, ("noise", "haze", "camera"))
    assert 8 <= (noise.mean((1, 2, 3)) < 118).sum() <= 30 and haze.mean((1, 2, 3)).min() > 120
    assert (np.abs(np.diff(camera, axis=1)).mean((1, 2, 3)) < 0.6 * camera.std((1, 2, 3))).sum() > 15


def test_crops_and_turns_of_a_pair_are_the_same_and_small_images_are_padded(tree):
    aligned = TrainingSet([folder_set(tree, degraded="clean", clean="clean")], seed=0)
    patches = [aligned[(0, position, 16)] for position in range(20)]
    assert all(torch.equal(degraded, clean) for degraded, clean, _ in patches)
    assert len({patch[0].numpy().tobytes() for patch in patches}) == 20
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (5, 30, 3), dtype=np.uint8)
    crop, depth = random_crop([image, image[..., 0]], 16, rng)
    assert crop.shape == (16, 16, 3) and np.array_equal(crop[..., 0], depth) and np.isin(crop, image).all()
    assert len({random_dihedral([np.arange(4).reshape(2, 2, 1)], rng)[0].tobytes() for _ in range(200)}) == 8
    images = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8)
    assert to_batch(images).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(to_batch(images), torch.stack([to_tensor(image.numpy()) for image in images]))


def test_balanced_batches_hold_every_source_equally():
    """Sources of 3 and 7, batches of 4: two of each, every sample before any again; so over two processes."""
    batches, *halves = (list(EpochSampler([3, 7], [(0, batch, 8)], 7, seed=3, rank=rank, processes=processes))
                        for rank, processes, batch in ((0, 1, 4), (0, 2, 2), (1, 2, 2)))
    assert batches == [first + second for first, second in zip(*halves, strict=True)]
    assert all(sum(index < 3 for index, _, _ in batch) == 2 for batch in batches)
    drawn = [index for batch in batches for index, _, _ in batch]
    for of_source, size in (([i for i in drawn if i < 3], 3), ([i - 3 for i in drawn if i >= 3], 7)):
        epochs = [of_source[first:first + size] for first in range(0, 14 - size + 1, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs) and epochs[0] != epochs[1]
    assert [position for batch in batches for _, position, _ in batch] == [*range(28)]
    assert list(EpochSampler([3, 7], [(0, 4, 8)], steps=7, seed=3, start=4)) == batches[4:]


def test_epochs_are_counted_by_samples():
    """Also where later stages have smaller batches, and over processes."""
    def of_run(processes: int = 1, **changes) -> EpochSampler:
        sources = [{"name": name, **CLEAN} for name in "ab"]
        content = {"name": "x", "sources": sources, "batch": 8, "patch": 64, **changes}
        of_file = options.parse(options.TrainOptions, content, "")
        return EpochSampler.of_run(of_file, [30, 10], 0, 0, processes)

    staged = of_run(2, steps=20, progressive=[[15, 2, 128], [10, 4, 96]])
    assert [staged.samples_before(step) for step in (0, 1, 10, 15, 20)] == [0, 16, 160, 200, 220]
    assert staged.epochs_before(20) == 220 / 40
    sizes = [(len(batch), batch[0][2]) for batch in staged]
    assert sizes == [(8, 64)] * 10 + [(4, 96)] * 5 + [(2, 128)] * 5
    assert of_run(epochs=3).steps == 15 and of_run(2, epochs=2.5).steps == 7        # 100 of 16: rounded up
    for balanced, groups, shares in ((False, [40], [0.75, 0.25]), (True, [30, 10], [0.5, 0.5])):
        assert of_run(steps=5, balanced=balanced).groups == groups
        assert probabilities([30, 10], balanced).tolist() == shares
