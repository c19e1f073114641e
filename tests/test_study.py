"""The study: equal conditions of its rows, its statistics on what is known, a run from begin to end."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from benchmarks import study, study_tables
from benchmarks.ablations import DESIGNS, ROWS, Bottleneck
from benchmarks.intervals import coverage, effects, interval
from conftest import REPOSITORY, write_image, write_yaml
from models.baryir import BaryIR
from utils.errors import InputError
from utils.options import TrainOptions, load_options

OPTIONS = REPOSITORY / "options"
NETWORK = {"width": 8, "encoder_blocks": [1, 1], "latent_blocks": 1, "transport_blocks": 1,
           "decoder_blocks": [1, 1], "residual_blocks": [1], "refinement_blocks": 0, "heads": [1, 2, 4]}
CHANGED = {"w": {"steps"}, "frozen": set(), "reconstruction": set(), "none": set(),
           "transport": {"scheme", "map_steps"}, "dropout": {"scheme", "map_steps"}, "e": set(), "g": set(),
           "transport_settled": set(), "frozen_settled": set(),
           "oracle": {"sources", "steps"}, "b": {"scheme", "network"}, "c": {"scheme"},
           # d: weight, distance, penalty; the clip grows with the weight; one step of T a batch.
           "d": {"scheme", "objective", "clip", "map_steps"}, "k": {"potential_learning_rate"}}


def test_rows_differ_in_one_thing_alone():
    assert ROWS.keys() == CHANGED.keys()
    for row, (design, file, *_) in ROWS.items():
        options, base = (dataclasses.asdict(load_options(TrainOptions, str(OPTIONS / design / name)))
                         for name in (file, "base.yml"))
        assert {key for key in options if options[key] != base[key]} == CHANGED[row] | {"name"}


@pytest.mark.parametrize("design", DESIGNS)
def test_tests_and_matched_scenes_are_of_trained_sources(design):
    options = load_options(TrainOptions, str(OPTIONS / design / "base.yml"))
    (held_out,) = {tuple(source.holdout_layers) for source in options.sources if source.layers}
    names = {source.name for source in options.sources}
    assert held_out and set(study.LEFT_OUT) < names
    sets = {path.stem: yaml.safe_load(path.read_text())["sets"] for path in (OPTIONS / design).glob("*.yml")
            if path.stem in ("test", "matched", "images")}
    assert {images["name"] for images in sets["matched"]} == names
    for images in itertools.chain.from_iterable(sets.values()):
        if "layers" in images and not images["name"].startswith("oracle"):
            assert tuple(images["holdout_layers"]) == held_out


def test_a_bottleneck_restores_from_b_and_the_mean_of_r_alone():
    net, degraded = Bottleneck(**NETWORK).eval(), torch.rand(2, 3, 24, 32)
    z, skips = net.encode(degraded)
    b = net.transport(z)
    restored = net.decode(b, z - b, skips)
    assert torch.equal(restored, net(degraded)[0]) and not any(skip.any() for skip in skips)
    shuffled = (z - b).flatten(2).flip(2).view_as(b)
    torch.testing.assert_close(net.decode(b, shuffled, skips), restored)
    assert not torch.allclose(net.decode(b, 0 * b, skips), restored)
    assert torch.equal(Bottleneck("none", **NETWORK).transport(z), z)
    dropping = Bottleneck(dropout=0.5, **NETWORK)
    given = torch.cat([b[:1]] * 40), torch.cat([(z - b)[:1]] * 40), [torch.cat([s[:1]] * 40) for s in skips]
    assert len(dropping.decode(*given).flatten(1).round(decimals=4).unique(dim=0)) == 2
    assert len(dropping.eval().decode(*given).flatten(1).round(decimals=4).unique(dim=0)) == 1
    frozen = Bottleneck("frozen", **NETWORK)                    # it passes gradients, and is no parameter
    assert frozen.state_dict().keys() == BaryIR(**NETWORK).state_dict().keys()
    assert not any(name.startswith("transport_map") for name, _ in frozen.named_parameters())
    frozen(degraded)[0].sum().backward()
    assert frozen.patch_embed.weight.grad.abs().sum() > 0


def scores(seeds: int, gain: float = 0.0) -> list[tuple[int, str, str, float]]:
    """Of two sets of the same 40 images, which differ by 5 dB, seeds by 0.03 dB."""
    rng = np.random.default_rng(0)
    images, noise = 30 + 5 * rng.normal(size=40), 0.03 * rng.normal(size=(2, seeds, 1, 1))
    values = images + noise[int(gain > 0)] + 0.1 * rng.normal(size=(seeds, 2, 40)) + gain
    return [(seed, "xy"[x], str(n), values[seed, x, n]) for seed in range(seeds) for x in range(2)
            for n in range(40)]


def test_interval_of_a_known_gain():
    ours, theirs = effects(scores(3, 0.5)), effects(scores(3))
    assert theirs.seeds.shape == (3,) and theirs.images.shape == (3, 40)
    assert np.abs(theirs.images.mean(axis=1)).max() < 1e-9
    assert theirs.seeds[1] == pytest.approx(np.mean([value for seed, *_, value in scores(3) if seed == 1]))
    for paired in (False, True):
        gain, low, high = interval(ours, theirs, paired)
        assert gain == pytest.approx(0.5, abs=0.2) and 0 < low < gain < high < 1
    assert np.isnan(interval(effects(scores(1, 0.5)), theirs, False)[1:]).all()     # one seed tells nothing
    difference, low, high = interval(theirs, theirs, False)
    assert difference == 0 and low < 0 < high
    once = [score for score in scores(3) if score[1] == "x"]
    twice = once + [(seed, "y", image, value) for seed, _, image, value in once]
    for of_twice, of_once in zip(effects(twice), effects(once), strict=True):
        np.testing.assert_allclose(of_twice, of_once)           # an image in two sets is no two images


@pytest.mark.parametrize("seeds, paired", [(3, False), (3, True), (8, True)])
def test_intervals_hold_the_truth(seeds, paired):
    assert 0.94 <= coverage(seeds, paired, (0.3, 0.1, 0.3), draws=1000) <= 0.98


@pytest.fixture
def small_study(tmp_path: Path, monkeypatch) -> Path:
    """Rows of two tiny sources in the place of the option files: a plain network and arms of a bottleneck."""
    for n in range(3):
        write_image(tmp_path / f"data/clean/{n}.png", 48, 40, seed=n)

    def noisy(name: str, level: int) -> dict:
        return {"name": name, "clean": "clean", "degradation": "noise", "levels": [level]}

    mixed = noisy("mixed_haze", 9) | {"degraded": "made/haze", "clean": "made/clean"}
    seen, matched = ([noisy(f"{of}rain", 20), noisy(f"{of}haze", 40)] for of in ("seen_", ""))
    base = {"name": "base", "steps": 2, "batch": 2, "patch": 16, "workers": 0, "network": NETWORK,
            "scheme": "reconstruction", "learning_rate": 1e-2,
            "sources": [noisy("rain", 10), noisy("haze", 30), noisy("noise", 20)]}
    other, separate = {"base": "base.yml"}, {"base": "base.yml", "scheme": "separate"}
    rows = {"study/base": base | {"ema": 0.9}, "study/b_restormer_large": other, "study/e_separate": separate,
            "decide/base": base, "decide/transport": separate,
            **{f"decide/{name}": other for name in ("w", "frozen", "settled")}}
    made = [noisy(name, 1) | {"degradation": name} for name in ("clean", "haze")]
    sets = {"study/test": seen, "decide/test": [*seen, noisy("level_rain", 60), mixed],
            "study/matched": matched, "decide/matched": matched, "decide/images": made}
    tests = {name: {"name": "some", "checkpoint": "none", "sets": of_file} for name, of_file in sets.items()}
    for folder in ("study", "decide"):
        (tmp_path / "options" / folder).mkdir(parents=True)
    for name, options in (rows | tests).items():
        write_yaml(tmp_path / f"options/{name}.yml", options)
    monkeypatch.setattr(study, "OPTIONS", tmp_path / "options")
    monkeypatch.setattr(study_tables, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(study, "LEFT_OUT", ("noise",))
    monkeypatch.chdir(REPOSITORY)
    return tmp_path


def test_runs_and_tables(small_study, capsys):
    with pytest.raises(InputError, match="no runs.csv yet"):
        study_tables.tables()
    where = ["--root", str(small_study / "data"), "--output", str(small_study / "runs")]
    for arguments in ("--rows b e --seeds 1", "--rows b --seeds 1 --last",
                      "--rows w transport frozen transport_settled --seeds 2", "--tables"):
        capsys.readouterr()
        study.main([*where, *arguments.split()])
    text = capsys.readouterr().out
    for words in ("e less b", "b, last less b", "transport less frozen", "transport: T off", "The claim",
                  "retrieval", "frozen: r of another source"):
        assert words in text
    assert not [line for line in text.splitlines() if "transport less" in line and "(one seed)" in line]
    runs = study_tables.read(small_study / "results/runs.csv")
    assert [line["weights"] for line in runs if line["row"] == "b"] == ["averaged", "last"]
    hashes = {(line["row"], line["seed"]): line["samples_hash"] for line in runs}
    assert hashes["b", "0"] == hashes["e", "0"]                 # same samples for all rows
    assert hashes["w", "0"] != hashes["transport", "0"] == hashes["frozen", "0"] != hashes["frozen", "1"]
    tables = (study_tables.read(small_study / f"results/{name}.csv") for name in ("images", "sets"))
    of_e, (of_set,) = ([float(line["psnr"]) for line in lines
                        if (line["row"], line["set"]) == ("e", "seen_rain")] for lines in tables)
    assert len(of_e) == 3 and of_set == pytest.approx(np.mean(of_e), abs=1e-3)
    study_tables.collect(small_study / "nowhere")               # what is there stays
    assert study_tables.read(small_study / "results/runs.csv") == runs
    nets = {row: torch.load(small_study / f"runs/{row}_0/last.pth")["net"]
            for row in ("w", "frozen", "transport", "transport_settled")}
    of_map = {row: net["transport_map.0.norm1.weight"] for row, net in nets.items()}
    assert torch.equal(of_map["frozen"], of_map["w"]) and not torch.equal(of_map["transport"], of_map["w"])
    assert not torch.equal(nets["frozen"]["patch_embed.weight"], nets["w"]["patch_embed.weight"])
    moved, still = (nets[row] for row in ("transport_settled", "transport"))
    stages = {name.partition(".")[0] for name in still if not torch.equal(moved[name], still[name])}
    assert "decoder" in stages and not stages & {"patch_embed", "encoder", "down", "latent", "latent_norm",
                                                 "transport_map"}
