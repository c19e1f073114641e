"""Pairing by key, what sources report and refuse, repeatable patches, degradations, the sampler."""

import pickle
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from conftest import write_image
from data import cache
from data.cache import DecodedImages, decode_all
from data.datasets import ImageSet, TrainingSet, bundled_depth, open_test_sets
from data.degradations import BY_LEVEL, file_rng
from data.pairs import match_pairs
from data.sampler import EpochSampler
from data.transforms import random_crop, random_dihedral, to_batch, to_tensor
from utils import options
from utils.errors import InputError
from utils.evaluation import degraded_and_clean
from utils.images import read_image
from utils.options import parse


def pairs_of(degraded: list[str], clean: list[str], pairing: str = "auto") -> dict[str, str]:
    sides = [Path("in", name) for name in degraded], [Path("gt", name) for name in clean]
    matching = match_pairs(*sides, pairing, Path("in"), Path("gt"))
    assert not matching.unpaired and not matching.ambiguous
    return {str(pair.degraded.relative_to("in")): str(pair.clean.relative_to("gt"))
            for pair in matching.pairs}


def unmatched(degraded: list[str], clean: list[str], pairing: str = "auto") -> tuple[list, list]:
    sides = [Path("in", name) for name in degraded], [Path("gt", name) for name in clean]
    matching = match_pairs(*sides, pairing, Path("in"), Path("gt"))
    unpaired = [(str(path), str(wanted)) for path, wanted in matching.unpaired]
    return unpaired, [tuple(map(str, paths)) for paths in matching.ambiguous]


@pytest.mark.parametrize("degraded, clean, expected", [
    (["b.png", "a.png"], ["a.png", "b.png"], ["b.png", "a.png"]),
    (["a.png", "b.png"], ["b.jpg", "a.jpg"], ["a.jpg", "b.jpg"]),                   # same stem
    (["rain-10.png", "rain-2.png"], ["norain-2.png", "norain-10.png"], ["norain-10.png", "norain-2.png"]),
    (["1_0.8_0.1.jpg", "1_1_0.2.jpg", "10_1_0.1.jpg"], ["10.png", "1.png"], ["1.png", "1.png", "10.png"]),
    (["01_outdoor_hazy.jpg"], ["01_outdoor_GT.jpg"], ["01_outdoor_GT.jpg"]),
    (["000.png"], ["000gt.png"], ["000gt.png"]),
    (["a.png"], ["a.jpg", "a.png"], ["a.png"]),                                     # the name before the stem
    (["x/1.png", "y/1.png"], ["y/1.png", "x/1.png"], ["x/1.png", "y/1.png"]),       # mirrored sub-folders
    (["part1/1_a.jpg", "part4/2_a.jpg"], ["1.jpg", "2.jpg"], ["1.jpg", "2.jpg"]),   # sub-folders on one side
])
def test_pairs_are_made_by_key(degraded, clean, expected):
    assert pairs_of(degraded, clean) == dict(zip(degraded, expected, strict=True))


def test_unpaired_and_ambiguous_names():
    assert unmatched(["a.png", "b.png"], ["a.png", "c.png"]) == ([("in/b.png", "gt/b")], [])
    assert unmatched(["a.png"], ["a.bmp", "a.jpg"]) == ([], [("in/a.png", "gt/a.bmp", "gt/a.jpg")])
    assert unmatched(["1_2.png"], ["1.png"], pairing="same") == ([("in/1_2.png", "gt/1_2")], [])
    assert unmatched(["x/1.png", "y/1.png"], ["x/1.png"]) == ([("in/y/1.png", "gt/y/1")], [])  # not gt/x
    assert unmatched(["cat_1.png", "cat_2.png", "cat_3.png"], ["cat_1.png", "cat_2.png", "cat.png"]) == (
        [("in/cat_3.png", "gt/cat_3")], [])                     # not all of them to cat.png


def test_unpaired_and_ambiguous_files_are_errors(tmp_path):
    for name in ("in/a.png", "in/b.png", "gt/a.png"):
        write_image(tmp_path / name)
    message = (r"file: set: 1 of 2 degraded images have no clean partner: "
               r"\S*in/b.png \(expected \S*gt/b\.\*\)$")
    with pytest.raises(InputError, match=message):
        folder_set(tmp_path, degraded="in", clean="gt")
    write_image(tmp_path / "gt/ab.jpg")
    with pytest.raises(InputError, match=r"b\.\*, did you mean ab\?\)"):
        folder_set(tmp_path, degraded="in", clean="gt")
    for name in ("gt/b.bmp", "gt/b.jpg"):
        write_image(tmp_path / name)
    with pytest.raises(InputError, match=r"gt/b.bmp and \S*gt/b.jpg have the same name"):
        folder_set(tmp_path, degraded="in", clean="gt")


def test_first_folder_that_exists(tmp_path):
    write_image(tmp_path / "second/a.png")
    images = folder_set(tmp_path, options.TestSet, degraded=["first", "second"])
    assert images.folder == tmp_path / "second"
    message = r"file: set.degraded: no folder \S*first, nor \S*seconds, did you mean \S*second\?$"
    with pytest.raises(InputError, match=message):
        folder_set(tmp_path, options.TestSet, degraded=["first", "seconds"])


def test_file_list_chooses_and_orders(tmp_path):
    for name in ("123.jpg", "124.jpg", "125.jpg"):
        write_image(tmp_path / "Train/Denoise" / name)
    (tmp_path / "list.txt").write_text("125.jpg\n/Denoise/123.jpg 1\n\n")
    description = dict(clean="Train/Denoise", degradation="noise", levels=[25], file_list="list.txt")
    images = folder_set(tmp_path, **description)
    assert [path.clean.name for path in images.pairs] == ["125.jpg", "123.jpg"] and images.unused_clean == 0
    (tmp_path / "list.txt").write_text("a123.jpg\n124.jpg\na125.jpg\n126.png\n999.png\n")
    with pytest.raises(InputError) as error:
        folder_set(tmp_path, **description)
    assert "4 of 5 names" in str(error.value)
    assert "a123.jpg, did you mean 123.jpg?" in str(error.value)
    assert str(error.value).endswith("; ...")
    # A byte order mark, a blank in a name:
    (tmp_path / "list.txt").write_text("\ufeff123.jpg\nno 1.jpg\n", encoding="utf-8")
    write_image(tmp_path / "Train/Denoise/no 1.jpg")
    assert len(folder_set(tmp_path, **description)) == 2
    for content, message in ((b"\xff\xfe", "not a text file"), (b"\n", "is empty"),
                             (b"123.jpg\nDenoise/123.jpg\n", "123.jpg more than once")):
        (tmp_path / "list.txt").write_bytes(content)
        with pytest.raises(InputError, match=message):
            folder_set(tmp_path, **description)
    with pytest.raises(InputError, match="set.file_list: no file .*gone.txt"):
        folder_set(tmp_path, **{**description, "file_list": "gone.txt"})


def test_public_layout(public_tree):
    kinds = {"denoise": 3, "derain": 3, "dehaze": 4, "deblur": 2, "lowlight": 1}
    for kind, count in kinds.items():
        levels = {"levels": [25]} if kind == "denoise" else {}
        source = parse(options.Source, {"type": kind, **levels}, "here.")
        images = ImageSet(source, str(public_tree), "here")
        assert len(images) == count and str(count) in images.describe()
    write_image(public_tree / "Train/Deblur/sharp/unused.png")
    images = ImageSet(parse(options.Source, {"type": "deblur"}, ""), str(public_tree), "here")
    assert "1 clean images without a degraded one" in images.describe()


def folder_set(root: Path, kind=options.Source, **description) -> ImageSet:
    return ImageSet(parse(kind, {"name": "set", **description}, ""), str(root), "file: set")


def test_absent_and_empty_folders(tmp_path):
    with pytest.raises(InputError, match="file: set.clean: no folder .*nowhere"):
        folder_set(tmp_path, clean="nowhere", degradation="noise", levels=[25])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no images in .*empty"):
        folder_set(tmp_path, clean="empty", degradation="noise", levels=[25])
    reports = []
    description = {"name": "gone", "degraded": "gone", "optional": True}
    write_image(tmp_path / "there/1.png")
    there = {"name": "there", "degraded": "there"}
    both = [parse(options.TestSet, entry, "") for entry in (description, there)]
    found = open_test_sets(both, str(tmp_path), "sets", reports.append)
    assert [images.name for images in found] == ["there"]
    assert "left out (optional): sets[0] gone.degraded: no folder" in reports[0]
    with pytest.raises(InputError, match="sets: none of them is there, root"):      # by a mistyped root
        open_test_sets(both[:1], str(tmp_path), "sets", reports.append)
    half = parse(options.TestSet, {**there, "clean": "gt", "optional": True}, "")
    with pytest.raises(InputError, match="sets.0. there.clean: no folder"):         # half a set is not absent
        open_test_sets([half], str(tmp_path), "sets", reports.append)
    (tmp_path / "gone").mkdir()                                 # there, but wrong: never left out
    with pytest.raises(InputError, match="no images in"):
        open_test_sets([parse(options.TestSet, description, "")], str(tmp_path), "sets", reports.append)


def test_links_are_followed(tmp_path):
    """REVIEW 8: of a folder, of a file, of a folder below; a folder may be anywhere, too."""
    root = tmp_path / "root"
    outside = write_image(tmp_path / "elsewhere/b.png").parent
    (root / "files").mkdir(parents=True)
    (root / "linked").symlink_to(outside)
    (root / "files/b.png").symlink_to(outside / "b.png")
    (root / "deep").mkdir()
    (root / "deep/below").symlink_to(outside)
    for folder in ("../elsewhere", str(outside), "linked", "files", "deep"):
        images = folder_set(root, options.TestSet, degraded=folder)
        assert len(images) == 1 and images.read(0)[0].shape == (32, 40, 3)
    (outside / "inside").symlink_to(outside)                    # a circle
    assert len(folder_set(root, options.TestSet, degraded="linked")) == 1
    (tmp_path / "link").symlink_to(root)                        # the root itself may be a link
    assert len(folder_set(tmp_path / "link", options.TestSet, degraded="files")) == 1


def test_no_name_leads_out_of_its_folder(tmp_path):
    """REVIEW 8: by .. or an absolute path, of a file list, of a name in one, of a bundled photograph."""
    root = tmp_path / "root"
    write_image(root / "in/a.png")
    outside = write_image(tmp_path / "private/b.png").parent
    (outside / "list.txt").write_text("a.png\n")
    message = r"file_list: .*private/list.txt leads out of root .*root, expected a file below it"
    for path in ("../private/list.txt", str(outside / "list.txt")):
        with pytest.raises(InputError, match=message):
            folder_set(root, options.TestSet, degraded="in", file_list=path)
    message = r"list.txt lists .*b.png, expected names below|1 of 2 names in .* are not in"
    for name in ("../private/b.png", str(outside / "b.png"), "in/../../private/b.png"):
        (root / "list.txt").write_text(f"a.png\n{name}\n")
        with pytest.raises(InputError, match=message):
            folder_set(root, options.TestSet, degraded="in", file_list="list.txt")
    with pytest.raises(InputError, match="scikit-image ships no"):
        folder_set(root, options.TestSet, bundled=["../../README.md"])


def test_size_mismatch_names_both(tmp_path):
    write_image(tmp_path / "in/a.png", width=40)
    write_image(tmp_path / "gt/a.png", width=41)
    with pytest.raises(InputError, match="in/a.png is 40x32 but .*gt/a.png is 41x32"):
        folder_set(tmp_path, degraded="in", clean="gt").read(0)


def test_truncated_image_is_named(tmp_path):
    path = write_image(tmp_path / "in/a.jpg", 200, 200)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match="in/a.jpg: cannot be read as an image"):
        read_image(path)


def two_sources(tmp_path: Path, cache: bool = False) -> TrainingSet:
    for i in range(3):
        write_image(tmp_path / f"clean/{i}.png", seed=i)
        write_image(tmp_path / f"in/{i}.png", seed=i + 10)
    sources = [folder_set(tmp_path, clean="clean", degradation="noise", levels=[15, 50], repeat=2),
               folder_set(tmp_path, degraded="in", clean="clean", repeat=5)]
    decoded = decode_all(sources, tmp_path / "decoded.bin") if cache else None
    return TrainingSet(sources, seed=7, cache=decoded)


def test_epoch_lists_each_image_repeat_times(tmp_path):
    training_set = two_sources(tmp_path)
    assert training_set.samples_per_epoch == [6, 15] and len(training_set) == 21
    sources = [training_set[(index, 0, 16)][2] for index in range(21)]
    assert sources == [0] * 6 + [1] * 15


def test_patches_repeat_with_their_seed_workers_and_cache(tmp_path):
    training_set, cached = two_sources(tmp_path), two_sources(tmp_path, cache=True)

    def batches(dataset: TrainingSet, workers: int, start: int = 0) -> list:
        sampler = EpochSampler([len(dataset)], [(0, 4, 16), (8, 2, 24)], steps=12, seed=7, start=start)
        return list(DataLoader(dataset, batch_sampler=sampler, num_workers=workers))

    expected = batches(training_set, 0)
    assert len(expected) == 12
    assert expected[0][0].shape == (4, 16, 16, 3) and expected[8][0].shape == (2, 24, 24, 3)
    for other in (batches(training_set, 2), batches(cached, 0), batches(training_set, 0, start=5)):
        for ours, theirs in zip(expected[-len(other):], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(expected[0][0], expected[1][0])


def test_decoded_file_is_used_again_until_an_image_changes(tmp_path, monkeypatch):
    sources, file, decoded = two_sources(tmp_path).entries, tmp_path / "decoded.bin", []

    def decode() -> DecodedImages:
        return decode_all(sources, file)

    monkeypatch.setattr(cache, "decoding", lambda images, total: decoded.append(total) or images)
    first, again = decode(), decode()
    paths = {path for images in sources for path in images.files}
    assert decoded == [6] and len(paths) == 6
    sent = pickle.dumps(first)                                  # to a worker that is not forked: no pixels
    for images in (first, again, pickle.loads(sent)):
        assert all(path in images and np.array_equal(images[path], read_image(path)) for path in paths)
    assert len(sent) < 2000 < sum(first[path].size for path in paths) and Path("elsewhere.png") not in first
    changed = write_image(tmp_path / "in/1.png", 30, 50, seed=99)
    assert np.array_equal(decode()[changed], read_image(changed)) and decoded == [6, 6]


def test_batches_become_images():
    images = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8)
    batch = to_batch(images)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch, torch.stack([to_tensor(image.numpy()) for image in images]))


def test_pair_gets_the_same_crop_and_turn(tmp_path):
    write_image(tmp_path / "in/a.png", seed=1)
    write_image(tmp_path / "gt/a.png", seed=1)                  # identical: any difference is a misalignment
    dataset = TrainingSet([folder_set(tmp_path, degraded="in", clean="gt")], seed=0)
    patches = [dataset[(0, position, 16)] for position in range(20)]
    assert all(torch.equal(degraded, clean) for degraded, clean, _ in patches)
    assert len({patch[0].numpy().tobytes() for patch in patches}) == 20


def test_processes_share_one_sequence():
    def requests(rank: int, processes: int, batch: int) -> list:
        return list(EpochSampler([10], [(0, batch, 8)], steps=7, seed=3, rank=rank, processes=processes))

    single = requests(0, 1, 4)
    halves = [first + second for first, second in zip(requests(0, 2, 2), requests(1, 2, 2), strict=True)]
    assert single == halves
    first_epoch = [index for batch in single for index, position, _ in batch if position < 10]
    assert sorted(first_epoch) == list(range(10))


def test_balanced_batches_hold_every_source_equally():
    """Sources of 3 and 7 samples, batches of 4: two of each, every sample of a source before any again."""
    batches = list(EpochSampler([3, 7], [(0, 4, 8)], steps=7, seed=3))
    indices = [[index for index, _, _ in batch] for batch in batches]
    assert all(sum(index < 3 for index in batch) == 2 for batch in indices)
    drawn = [index for batch in indices for index in batch]
    for of_source, size in (([i for i in drawn if i < 3], 3), ([i - 3 for i in drawn if i >= 3], 7)):
        for first in range(0, 14 - size + 1, size):
            assert sorted(of_source[first:first + size]) == list(range(size))
    assert len({position for batch in batches for _, position, _ in batch}) == 28
    assert list(EpochSampler([3, 7], [(0, 4, 8)], steps=7, seed=3, start=4)) == batches[4:]


def test_small_images_are_padded_and_crops_agree():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (5, 30, 3), dtype=np.uint8)
    crop, depth = random_crop([image, image[..., 0]], 16, rng)
    assert crop.shape == (16, 16, 3) and depth.shape == (16, 16)
    assert np.array_equal(crop[..., 0], depth)
    assert np.array_equal(np.unique(crop), np.intersect1d(np.unique(crop), np.unique(image)))


def test_all_eight_turns_occur():
    image = np.arange(4, dtype=np.uint8).reshape(2, 2, 1)
    rng = np.random.default_rng(0)
    assert len({random_dihedral([image], rng)[0].tobytes() for _ in range(200)}) == 8


def test_noise_of_a_test_image(tmp_path):
    """The field's noise, spelled out; independent of the other files."""
    write_image(tmp_path / "clean/b.png", seed=1)
    write_image(tmp_path / "clean/a.png", seed=2)
    images = folder_set(tmp_path, options.TestSet, clean="clean", degradation="noise", levels=[25])
    degraded, clean = degraded_and_clean(images, 1)
    assert images.pairs[1].path.name == "b.png"
    randn = np.random.default_rng(zlib.crc32(b"b.png") + 25).standard_normal(clean.shape)
    assert np.array_equal(degraded, np.clip(clean + randn * 25, 0, 255).astype(np.uint8))


def test_noise_of_a_test_image_does_not_depend_on_the_others(tmp_path):
    for i, name in enumerate(("a.png", "b.png", "c.png", "sub/b2.png")):
        write_image(tmp_path / "clean" / name, seed=i)

    def noisy(**more) -> dict[str, np.ndarray]:
        images = folder_set(tmp_path, options.TestSet, clean="clean", degradation="noise", levels=[25],
                            **more)
        with ThreadPoolExecutor(3) as pool:                     # any order, any number of workers
            indices = list(range(len(images)))[::-1]
            found = pool.map(lambda index: degraded_and_clean(images, index)[0], indices)
            return {str(images.name_of(index)): image for index, image in zip(indices, found, strict=True)}

    before = noisy()
    (tmp_path / "list.txt").write_text("c.png\nb.png\n")
    listed = noisy(file_list="list.txt")
    (tmp_path / "clean/a.png").unlink()
    write_image(tmp_path / "clean/0.png", seed=9)
    after = noisy()
    for other in (listed, after):
        assert len(set(other) & set(before)) >= 2
        assert all(np.array_equal(other[name], before[name]) for name in set(other) & set(before))
    assert not np.array_equal(before["a.png"], before["b.png"])


def test_mixed_degradations_come_on_top_of_the_degraded_image(tmp_path):
    for i in range(2):
        write_image(tmp_path / f"in/{i}.png", seed=i)
        write_image(tmp_path / f"gt/{i}.png", seed=i + 10)
    images = folder_set(tmp_path, options.TestSet, degraded="in", clean="gt", degradation="noise",
                        levels=[25])
    degraded, clean = degraded_and_clean(images, 1)
    rainy = read_image(tmp_path / "in/1.png")
    randn = np.random.default_rng(zlib.crc32(b"1.png") + 25).standard_normal(rainy.shape)
    assert np.array_equal(degraded, np.clip(rainy + randn * 25, 0, 255).astype(np.uint8))
    assert np.array_equal(clean, read_image(tmp_path / "gt/1.png"))
    sources = [folder_set(tmp_path, degraded="in", clean="gt", degradation="noise", levels=[1]),
               folder_set(tmp_path, degraded="in", clean="gt")]
    training_set = TrainingSet(sources, seed=0)
    mixed, plain = training_set[(0, 0, 32)], training_set[(2, 0, 32)]       # one patch with and without noise
    assert torch.equal(mixed[1], plain[1])
    assert 0 < (mixed[0].float() - plain[0].float()).abs().mean() < 3


@pytest.mark.parametrize("kind, level", [
    ("noise", 25), ("rain", 6), ("haze", 2), ("blur", 9), ("lowlight", 4)])
def test_degradations_repeat_and_degrade(kind, level):
    clean = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    names = ("a.png", "a.png", "b.png")
    once, again, other = (BY_LEVEL[kind](clean, level, file_rng(name, level)) for name in names)
    assert once.dtype == np.uint8 and once.shape == clean.shape
    assert np.array_equal(once, again) and not np.array_equal(once, other) and not np.array_equal(once, clean)
    mean = {"rain": 1, "haze": 1, "lowlight": -1}.get(kind, 0)  # rain and haze add light, low light takes it
    assert mean * (float(once.mean()) - float(clean.mean())) >= 0


def test_haze_follows_depth():
    depth = bundled_depth("motorcycle_left.png")
    assert depth.min() > 0 and depth.max() == 1 and bundled_depth("coffee.png") is None
    black = np.zeros((*depth.shape, 3), np.uint8)
    hazy = BY_LEVEL["haze"](black, 2.0, np.random.default_rng(0), depth)
    order = np.argsort(depth.ravel())
    assert (np.diff(hazy[..., 0].ravel()[order].astype(int)) >= 0).all()


def test_grey_alpha_and_16_bit_files_are_read_as_rgb(tmp_path):
    grey = (np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    Image.fromarray((grey // 257).astype(np.uint8)).save(tmp_path / "grey.png")
    deep, plain = read_image(tmp_path / "deep.png"), read_image(tmp_path / "grey.png")
    assert deep.shape == plain.shape == (8, 8, 3) and np.abs(deep.astype(int) - plain).max() <= 1
