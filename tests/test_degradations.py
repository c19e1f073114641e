"""Degradations: each formula, what is drawn for it, and the drawings that are clean inputs."""

import numpy as np
import pytest

from data import degradations
from data.datasets import bundled_depth
from data.degradations import DEGRADATIONS, LIGHT, RAW, RECORDED, Parts, camera_noise, photographed
from data.drawings import black_frame, clean_pair, colours, darker

STRENGTHS = {"noise": 25, "camera": 4, "poisson": 30, "rain": 2, "haze": 1, "underwater": 1, "blur": 9,
             "defocus": 2, "gaussian_blur": 2, "lowlight": 3, "jpeg": 20, "jpeg_444": 20, "clean": 0}
NOT_RANDOM = ("defocus", "gaussian_blur", "jpeg", "jpeg_444", "clean")
NO_NOISE = -40                                                  # stops of a camera


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def degrade(kind: str, clean: np.ndarray, strength: float, seed: int = 0, **parts) -> tuple:
    return DEGRADATIONS[kind](clean, strength, rng(seed), Parts(**parts))


def photograph(height: int = 60, width: int = 80) -> np.ndarray:
    """A smooth picture with an edge, [H,W,3] uint8."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 7) + np.cos(y / 9), np.sin((x + y) / 11), np.cos(x / 5)], axis=2)
    return (128 + 50 * waves + 20 * (x > width // 2)[..., None]).clip(0, 255).astype(np.uint8)


def flat(value: int, size: int = 64) -> np.ndarray:
    return np.full((size, size, 3), value, np.uint8)


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_each_repeats_by_its_generator_and_degrades(kind):
    clean = photograph()
    before = clean.copy()
    pairs = [degrade(kind, clean, STRENGTHS[kind], seed) for seed in (0, 0, 1)]
    (once, target), (again, _), (other, _) = pairs
    assert once.dtype == target.dtype == np.uint8 and once.shape == target.shape
    assert np.array_equal(once, again) and np.array_equal(clean, before)
    assert np.array_equal(once, other) == (kind in NOT_RANDOM)
    assert np.array_equal(once, target) == (kind == "clean")
    assert np.array_equal(target, clean) == (kind != "camera")


def test_shot_noise_gaussian_blur_the_underwater_cast_and_the_colours_of_jpeg():
    shot = degrade("poisson", flat(128), 30)[0]
    assert abs(shot.mean() - 128) < 1.5 and abs(shot.std() - 255 * (128 / 255 / 30) ** 0.5) < 2
    point = flat(0, 41)
    point[20, 20] = 255
    assert degrade("gaussian_blur", point, 2)[0][20, 20, 0] == pytest.approx(255 / (2 * np.pi * 4), abs=1)
    red, green, blue = degrade("underwater", flat(128), 1)[0].reshape(-1, 3).mean(axis=0)
    assert red < green < 128 and red < blue < 132
    clean = flat(0, 32)
    clean[:, ::2, 0], clean[:, 1::2, 2] = 255, 255              # red and blue columns
    half, full = (degrade(kind, clean, 90)[0].astype(int) for kind in ("jpeg", "jpeg_444"))
    assert np.abs(half - clean).mean() > 4 * np.abs(full - clean).mean() > 0


def test_a_cameras_noise_grows_with_gain_and_light_and_spreads_over_neighbours():
    """Demosaicing fills in pixels, most of them where fewest are seen: red and blue."""
    def variance(value: int, stops: float) -> float:
        noisy, quiet = photographed(flat(value), stops, rng(1))
        return float((RAW[noisy] - RAW[quiet]).var())           # of what the sensor sees

    for low, high in ((0, 2), (2, 4), (4, 6)):
        assert 3 < variance(120, high) / variance(120, low) < 8             # 4: two stops of shot noise
    assert variance(150, 2) / variance(60, 2) == pytest.approx(RAW[150] / RAW[60], rel=0.1)         # of light
    noisy, quiet = photographed(flat(120), 3, rng(1))
    left, right = (noisy.astype(float) - quiet)[:, :-1], (noisy.astype(float) - quiet)[:, 1:]
    red, green, blue = (np.corrcoef(left[..., c].ravel(), right[..., c].ravel())[0, 1] for c in range(3))
    assert 0.3 < green < red and 0.3 < green < blue


def test_a_cameras_target_is_its_photograph_without_noise():
    """Whatever the gain; unprocessing and its inverse give the scene; the noisy side alone is a JPEG."""
    scene = photograph()
    quiet, noisy = ([degrade("camera", scene, stops, seed) for seed in range(40)] for stops in (NO_NOISE, 6))
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(quiet, noisy, strict=True))
    assert 10 <= sum(np.array_equal(*pair) for pair in quiet) <= 30                 # the other half is stored
    whole = [target for _, target in quiet if target.shape == scene.shape]
    assert 20 <= len(whole) <= 36 and min(len(target) for _, target in quiet) >= 30     # the others shrunk
    assert all(np.abs(target.astype(float) - scene).mean() < 1 for target in whole)
    for grey in (240, 255):                                                 # grey stays grey
        assert (photographed(flat(grey), NO_NOISE, rng())[1] == grey).all()
    # Demosaicing softens an edge; noise alone does not, and without noise and JPEG nothing changes.
    without = [camera_noise(scene, NO_NOISE, rng(seed)) for seed in range(20)]
    assert 4 <= sum(np.array_equal(image, scene) for image in without) <= 16
    mean = np.mean([camera_noise(scene, 3, rng(seed)) for seed in range(60)], axis=0)
    assert np.abs(mean - scene)[:, 38:44].mean() < 2


def test_a_recorded_rain_layer_is_added_as_it_is_covers_any_image_and_does_not_wrap_around():
    clean, layer = photograph(), rng(5).integers(0, 90, (60, 80), dtype=np.uint8)
    sides = [np.minimum(clean.astype(int) + s[..., None], 255) for s in (layer, layer[:, ::-1])]
    rainy = [degrade("rain", clean, 1, seed, layer=lambda _: layer)[0] for seed in range(40)]
    as_it_is = sum(any(np.array_equal(image, side) for side in sides) for image in rainy)
    assert 10 <= as_it_is <= 30                                 # the others are turned and scaled
    assert degradations.placed_layer(np.full((20, 20), 9, np.uint8), (50, 70), rng(3)).min() == 9
    layer = np.zeros((60, 80), np.uint8)
    layer[:, :4] = 200                                          # at one side
    placed = [degradations.placed_layer(layer, (60, 80), rng(seed)) for seed in range(40)]
    assert not any(image[:, :6].any() and image[:, -6:].any() for image in placed)
    assert sum(image[:, :6].any() or image[:, -6:].any() for image in placed) > 20


def test_haze_follows_the_scattering_law_with_its_recorded_depth():
    clean, depth = photograph(), rng(1).random((60, 80)).astype(np.float32)
    hazy = degrade("haze", clean, 1.3, depth=depth, airlight=(1.0, 1.0))[0]
    t = np.exp(-1.3 * depth.astype(np.float64))[..., None]
    assert np.abs(hazy - (clean * t + 255 * (1 - t))).max() <= 0.51
    far = dict(depth=np.full((8, 8), 50, np.float32), airlight=(0.7, 0.9))
    colours = np.array([degrade("haze", flat(0, 8), 1, seed, **far)[0][0, 0] for seed in range(50)], int)
    assert 0.7 * 255 - 1 <= colours.min() and colours.max() <= 0.9 * 255 + 1
    assert np.ptp(colours, axis=1).max() > 3 and np.ptp(colours, axis=0).min() > 30     # channels, samples
    recorded = bundled_depth("motorcycle_left.png")
    assert recorded.min() > 0 and recorded.max() == 1 and bundled_depth("coffee.png") is None
    # Random depth is smooth and reaches the horizon.
    fields = np.stack([degradations.smooth_field((60, 80), rng(seed)) for seed in range(50)])
    assert np.allclose(fields.max(axis=(1, 2)), 1) and np.abs(np.diff(fields, axis=2)).max() < 0.1
    lows = fields.min(axis=(1, 2))
    assert 0 <= lows.min() < 0.1 and 0.4 < lows.max() <= 0.5
    assert fields[:, :20].mean() > fields[:, -20:].mean() + 0.1             # mostly farther at the top
    shares = (fields - lows[:, None, None]) / (1 - lows[:, None, None])
    assert np.median(shares) < 0.35 < np.quantile(shares, 0.8)              # most is near


def test_blur_averages_linear_light_and_does_not_wrap_around():
    """A white half on black: amid the edge half the light, 8-bit value 255 * 0.5^(1/2.2) = 186, not 128."""
    edge = flat(0, 41)
    edge[:, 21:] = 255
    for kind, strength in (("defocus", 4), ("blur", 15)):
        blurred = degrade(kind, edge, strength, 2)[0]
        assert LIGHT[blurred].mean() == pytest.approx(LIGHT[edge].mean(), abs=0.01)
        assert blurred[:, :3].max() == 0 and blurred[:, -3:].min() == 255
    assert np.array_equal(degrade("blur", flat(77), 9)[0], flat(77))
    path = np.array([[0.0, -1.0], [0.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    kernel = degradations.path_kernel(path)                     # time in each pixel
    assert np.allclose(kernel[len(kernel) // 2, 1:-1], [0.25, 0.25, 0.5]) and kernel.sum() == pytest.approx(1)


def test_low_light_takes_stops_of_light_and_a_frame_that_recorded_nothing_stays_dark():
    """Six stops take 20 below one of 255; one bright pixel is enough of a picture."""
    shares = [LIGHT[degrade("lowlight", flat(200), 3, seed)[0]].mean() / LIGHT[200] for seed in range(30)]
    assert np.median(shares) == pytest.approx(1 / 8, rel=0.4)
    dark = flat(20)
    degraded, target = degrade("lowlight", dark, 6)
    assert target.max() < RECORDED and degraded.mean() < 2 * RECORDED and not np.array_equal(target, dark)
    dark[0, 0] = 250
    assert np.array_equal(degrade("lowlight", dark, 6)[1], dark)


def test_clean_inputs_are_photographs_drawings_and_black_frames():
    photo = photograph(64, 64)
    pairs = [clean_pair(photo, rng(seed)) for seed in range(300)]
    assert all(image.shape == photo.shape and image.dtype == np.uint8 for pair in pairs for image in pair)
    as_it_is = sum(np.array_equal(pair[0], photo) for pair in pairs)
    frames = [pair for pair in pairs if not np.array_equal(*pair)]
    one_colour = sum(np.ptp(image.reshape(-1, 3), axis=0).max() == 0 for image, _ in pairs)
    assert 40 <= as_it_is <= 85 and 50 <= len(frames) <= 95 and 15 <= one_colour <= 50
    assert len({image.tobytes() for image, _ in pairs}) >= 300 - as_it_is
    dark = [darker(photo, rng(seed)).astype(int) for seed in range(60)]
    assert all((one <= photo).all() and one.max() > 0.39 * photo.max() for one in dark)
    grounds = np.stack([colours(8, rng(seed)) for seed in range(200)])
    assert 75 <= sum(np.ptp(grounds, axis=3).max(axis=(1, 2)) == 0) <= 125                  # half are grey
    assert 95 <= sum(grounds.max(axis=(1, 2, 3)) < 64) <= 135               # half are dark, as others may be
    for degraded, target in [*frames, *(black_frame(flat(255), rng(seed)) for seed in range(99))]:
        assert target.max() < RECORDED and degraded.mean() < 40
