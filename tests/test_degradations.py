"""Degradations drawn from ranges: their laws, their parts, what training patches get of them."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import run_script, write_image
from data.cache import check_all
from data.datasets import ImageSet, TrainingSet
from data.degradations import BY_LEVEL, BY_RANGE, LIGHT, Parts, path_kernel, placed_layer, plain_patch
from utils import options
from utils.errors import InputError
from utils.evaluation import degraded_and_clean

STRENGTHS = {"noise": 25, "rain": 2, "haze": 1.0, "blur": 9, "defocus": 2, "lowlight": 3, "jpeg": 20,
             "clean": 0}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def photograph(height: int = 60, width: int = 80) -> np.ndarray:
    """A smooth picture with edges, [H,W,3] uint8."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 7) + np.cos(y / 9), np.sin((x + y) / 11), np.cos(x / 5)], axis=2)
    return (128 + 50 * waves + 20 * (x > width // 2)[..., None]).clip(0, 255).astype(np.uint8)


def image_set(root, kind=options.Source, **entry) -> ImageSet:
    return ImageSet(kind(**entry), str(root), "some.yml: sources[0]")


@pytest.mark.parametrize("kind", BY_RANGE)
def test_they_repeat_by_their_generator_and_keep_the_size(kind):
    clean = photograph()
    before = clean.copy()
    once, again, other = (BY_RANGE[kind](clean, STRENGTHS[kind], rng(seed), Parts()) for seed in (0, 0, 1))
    assert once.dtype == np.uint8 and once.shape == clean.shape and np.array_equal(once, again)
    assert np.array_equal(clean, before)
    if kind not in ("defocus", "jpeg", "clean"):
        assert not np.array_equal(once, other)
    assert np.array_equal(once, clean) == (kind == "clean")


def test_a_recorded_rain_layer_is_added_as_it_is():
    clean, layer = photograph(), rng(5).integers(0, 90, (60, 80), dtype=np.uint8)
    expected = {True: 0, False: 0}
    for seed in range(40):                                      # every other one is turned and scaled
        rainy = BY_RANGE["rain"](clean, 1, rng(seed), Parts(layer=lambda _: layer))
        sides = [np.minimum(clean.astype(int) + s[..., None], 255) for s in (layer, layer[:, ::-1])]
        expected[any(np.array_equal(rainy, side) for side in sides)] += 1
    assert min(expected.values()) >= 10


def test_a_small_layer_covers_a_large_image():
    assert placed_layer(np.full((20, 20), 9, np.uint8), (50, 70), rng(3)).shape == (50, 70)


def test_haze_follows_the_scattering_law_with_its_recorded_depth():
    clean, depth = photograph(), rng(1).random((60, 80)).astype(np.float32)
    hazy = BY_RANGE["haze"](clean, 1.3, rng(), Parts(depth=depth, airlight=(1.0, 1.0)))
    t = np.exp(-1.3 * depth.astype(np.float64))[..., None]
    assert np.abs(hazy - (clean * t + 255 * (1 - t))).max() <= 0.51


def test_haze_draws_its_airlight_within_its_ends():
    black, far = np.zeros((8, 8, 3), np.uint8), np.full((8, 8), 50, np.float32)
    parts = Parts(far, airlight=(0.7, 0.9))
    colours = np.stack([BY_RANGE["haze"](black, 1.0, rng(seed), parts)[0, 0] for seed in range(50)])
    assert 0.7 * 255 - 1 <= colours.min() and colours.max() <= 0.9 * 255 + 1
    assert np.ptp(colours, axis=1).max() > 3 and np.ptp(colours, axis=0).min() > 30     # channels, samples


def test_blur_averages_linear_light():
    """A white half on black: amid the edge half the light, 8-bit value 255 * 0.5^(1/2.2) = 186, not 128."""
    edge = np.zeros((41, 41, 3), np.uint8)
    edge[:, 21:] = 255
    for kind, strength in (("defocus", 4), ("blur", 15)):
        blurred = BY_RANGE[kind](edge, strength, rng(2), Parts())
        assert LIGHT[blurred].mean() == pytest.approx(LIGHT[edge].mean(), abs=0.01)
        assert np.array_equal(blurred[:, :3], edge[:, :3]) and np.array_equal(blurred[:, -3:], edge[:, -3:])
    flat = np.full((30, 30, 3), 77, np.uint8)
    assert np.array_equal(BY_RANGE["blur"](flat, 9, rng(), Parts()), flat)


def test_path_kernel_is_the_time_spent_in_each_pixel():
    kernel = path_kernel(np.array([[0.0, -1.0], [0.0, 0.0], [0.0, 1.0], [0.0, 1.0]]))
    assert np.allclose(kernel[len(kernel) // 2, 1:-1], [0.25, 0.25, 0.5]) and kernel.sum() == pytest.approx(1)


def test_low_light_takes_stops_of_light():
    clean = np.full((100, 100, 3), 200, np.uint8)
    shares = [LIGHT[BY_RANGE["lowlight"](clean, 3, rng(seed), Parts())].mean() / LIGHT[200]
              for seed in range(30)]
    assert np.median(shares) == pytest.approx(1 / 8, rel=0.4)


def test_a_third_of_the_plain_patches_are_of_one_colour():
    patches = [plain_patch(16, rng(seed)).reshape(-1, 3) for seed in range(100)]
    kinds = Counter(len(np.unique(patch, axis=0)) == 1 for patch in patches)
    assert 25 <= kinds[True] <= 60


@pytest.fixture
def tree(tmp_path):
    """Clean photographs with depth at half their size, and rain layers."""
    for n in range(4):
        write_image(tmp_path / f"clean/{n}.png", 64, 48, seed=n)
        (tmp_path / "depth").mkdir(exist_ok=True)
        Image.fromarray(np.full((24, 32), 60 * n, np.uint8)).save(tmp_path / f"depth/{n}.png")
    (tmp_path / "layers").mkdir()
    Image.fromarray(np.full((48, 64), 30, np.uint8)).save(tmp_path / "layers/a.png")
    return tmp_path


def test_training_takes_depth_and_layers_from_disk(tree):
    haze = image_set(tree, name="haze", clean="clean", degradation="haze", range=[2, 2], airlight=[1, 1],
                     depth="depth")
    rain = image_set(tree, name="rain", clean="clean", degradation="rain", range=[1, 1], layers="layers")
    training_set = TrainingSet([haze, rain], seed=0)
    hazy, clean, source = training_set[(2, 0, 32)]
    t = np.exp(-2 * 120 / 255)
    assert source == 0 and (hazy - (clean * t + 255 * (1 - t))).abs().max() <= 0.6
    for position in range(6):
        rainy, clean, source = training_set[(5, position, 32)]
        assert source == 1 and torch.equal(rainy, (clean.int() + 30).clamp(max=255).byte())


@pytest.mark.parametrize("damaged", ["clean/1.png", "depth/2.png", "layers/a.png"])
def test_a_dry_run_decodes_depth_and_layers_too(tree, damaged):
    sets = [image_set(tree, name="haze", clean="clean", degradation="haze", range=[2, 2], depth="depth"),
            image_set(tree, name="rain", clean="clean", degradation="rain", range=[1, 1], layers="layers")]
    check_all(sets)
    (tree / damaged).write_bytes((tree / damaged).read_bytes()[:60])
    with pytest.raises(InputError, match=damaged):
        check_all(sets)


def test_a_blurred_patch_saw_what_lies_around_it(tree):
    """The patch of a blurred crop is the crop of a blurred image: nothing is mirrored at its edge."""
    images = image_set(tree, name="deblur", clean="clean", degradation="defocus", range=[3, 3])
    degraded, clean, _ = TrainingSet([images], seed=0)[(1, 7, 24)]
    assert images.margin == 3 and degraded.shape == clean.shape == (24, 24, 3)
    whole = images.read(1)[1]
    candidates = [np.rot90(side, turns) for turns in range(4) for side in (whole, whole[:, ::-1])]
    places = [(side, y, x) for side in candidates
              for y in range(3, side.shape[0] - 26) for x in range(3, side.shape[1] - 26)
              if np.array_equal(side[y:y + 24, x:x + 24], clean)]
    (side, y, x), = places
    blurred = BY_RANGE["defocus"](np.ascontiguousarray(side), 3, rng(), Parts())
    assert np.abs(blurred[y:y + 24, x:x + 24].astype(int) - degraded.numpy()).max() <= 1


def test_entries_of_one_source_have_one_index(tree):
    entries = [dict(source="noise", clean="clean", degradation="noise", range=[5, 50]),
               dict(name="rain", clean="clean", degradation="rain", range=[1, 2]),
               dict(source="noise", clean="depth", degradation="noise", levels=[25])]
    sets = [image_set(tree, **entry, repeat=n) for n, entry in enumerate(entries, 1)]
    training_set = TrainingSet(sets, seed=0)
    assert training_set.names == ["noise", "rain"] and training_set.samples_per_epoch == [16, 8]
    assert [training_set[(index, 0, 16)][2] for index in (0, 3, 4, 15, 16, 23)] == [0, 0, 0, 0, 1, 1]
    assert [images.folder.name for images in training_set.entries] == ["clean", "depth", "clean"]


def test_a_share_of_the_samples_is_clean(tree):
    images = image_set(tree, name="noise", clean="clean", degradation="noise", range=[50, 50])
    training_set = TrainingSet([images], seed=0, clean_share=0.3)
    clean = [torch.equal(*training_set[(n % 4, n, 16)][:2]) for n in range(200)]
    assert 40 <= sum(clean) <= 80
    assert not any(torch.equal(*TrainingSet([images], seed=0)[(n % 4, n, 16)][:2]) for n in range(50))


def test_a_share_of_the_degraded_samples_goes_through_a_camera(tree):
    """The other samples are bit for bit those without it, and inputs that are clean or noisy stay."""
    def samples(entry, **shares):
        training_set = TrainingSet([image_set(tree, name="x", clean="clean", **entry)], seed=0, **shares)
        return [training_set[(n % 4, n, 16)] for n in range(200)]

    haze = dict(degradation="haze", range=[1, 1], airlight=[1, 1])
    plain, taken = (samples(haze, clean_share=0.3, camera_share=share) for share in (1e-9, 0.5))
    changed = [not torch.equal(a[0], b[0]) for a, b in zip(plain, taken, strict=True)]
    assert all(torch.equal(a[1], b[1]) for a, b in zip(plain, taken, strict=True))
    assert 50 <= sum(changed) <= 90                             # half of seven tenths of 200
    assert not any(change and torch.equal(*pair[:2]) for change, pair in zip(changed, plain, strict=True))
    apart = torch.stack([b[0].double() - a[0] for a, b in zip(plain, taken, strict=True)])[changed]
    assert abs(apart.mean()) < 0.5 and 1 <= apart.abs().median() <= 5          # JPEG does more to noise
    noisy = dict(degradation="noise", range=[5, 50])
    assert all(torch.equal(a[0], b[0]) for a, b in zip(samples(noisy), samples(noisy, camera_share=1),
                                                       strict=True))


def test_what_a_source_holds_out_makes_a_validation_set(tree):
    noise = dict(clean="clean", degradation="noise", range=[5, 50])
    source = image_set(tree, name="noise", **noise, holdout=["[13].png"])
    held = image_set(tree, options.TestSet, name="held", **noise, holdout=["[13].png"])
    names = [path.name for images in (source, held) for path in images.files]
    assert names == ["0.png", "2.png", "1.png", "3.png"]
    assert np.array_equal(degraded_and_clean(held, 0)[0], degraded_and_clean(held, 0)[0])
    for pattern, message in (("x*", "names no image"), ("*", "leaves no image")):
        with pytest.raises(InputError, match=message):
            image_set(tree, name="noise", **noise, holdout=[pattern])


@pytest.mark.parametrize("entry, message", [
    (dict(degradation="noise", range=[50, 5]), r"range: \[50, 5\], expected two numbers \[low, high\]"),
    (dict(degradation="noise", range=[5, 50], levels=[25]), "range: given beside levels"),
    (dict(degradation="haze", range=[1, 2], airlight=[0.7, 1.2]), "airlight: "),
    (dict(degradation="jpeg", range=[0, 50]), "expected qualities of JPEG from 1 to 100"),
    (dict(degradation="noise", range=[5, 50], layers="layers"),
     "layers: given without a degradation rain by range"),
    (dict(degradation="haze", levels=[2], depth="depth"), "depth: given without a degradation haze by range"),
    (dict(degradation="defocus", levels=[2]), "levels: given for degradation defocus, expected a range"),
    (dict(degradation="haze"), "levels: none given for degradation haze"),
])
def test_ranges_and_parts_that_do_not_fit_are_refused(tree, entry, message):
    with pytest.raises(InputError, match=message):
        image_set(tree, name="x", clean="clean", **entry)


def test_missing_depth_is_named(tree):
    (tree / "depth/3.png").unlink()
    with pytest.raises(InputError, match=r"depth: .*depth has none for 1 of 4 images: .*3\.png"):
        image_set(tree, name="haze", clean="clean", degradation="haze", range=[1, 2], depth="depth")


def test_contact_sheet(tmp_path):
    write_image(tmp_path / "a.png", 64, 48)
    result = run_script("data/degradations.py", tmp_path / "a.png", tmp_path / "sheet.png")
    assert result.returncode == 0, result.stderr
    assert Image.open(tmp_path / "sheet.png").size == (3 * 68 + 4, len(BY_RANGE) * 52 + 4)


def test_levels_of_unseen_types():
    clean = np.full((64, 64, 3), 128, np.uint8)
    rng = np.random.default_rng(0)
    shot = BY_LEVEL["poisson"](clean, 30, rng)
    assert abs(shot.mean() - 128) < 1.5 and abs(shot.std() - 255 * (128 / 255 / 30) ** 0.5) < 2
    point = np.zeros((41, 41, 3), np.uint8)
    point[20, 20] = 255
    blurred = BY_LEVEL["gaussian_blur"](point, 2, rng).astype(float)
    assert blurred[20, 20, 0] == pytest.approx(255 / (2 * np.pi * 4), abs=1)
    red, green, blue = BY_LEVEL["underwater"](clean, 1, rng).reshape(-1, 3).mean(axis=0)
    assert red < green < 128 and red < blue < 132
