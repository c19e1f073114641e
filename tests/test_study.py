"""The study: equal conditions of its rows, its statistics on what is known, a run from begin to end."""

import dataclasses
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from benchmarks import study
from benchmarks.ablations import Bottleneck, OneLatent, load_as
from benchmarks.intervals import coverage, effects, interval
from conftest import REPOSITORY, write_image
from models.baryir import BaryIR
from utils.checkpoint import save_checkpoint
from utils.errors import InputError
from utils.options import TrainOptions, load_options

NETWORK = {"width": 8, "encoder_blocks": [1, 1], "latent_blocks": 1, "transport_blocks": 1,
           "decoder_blocks": [1, 1], "residual_blocks": [1], "refinement_blocks": 0, "heads": [1, 2, 4]}


@pytest.mark.parametrize(("design", "allowed"), [
    ("study", {"b": {"scheme", "network"}, "c": {"scheme"}, "e": set(), "g": set(),
               "k": {"potential_learning_rate"},
               # d: weight, distance, penalty; the clip grows with the weight; one step of T a batch.
               "d": {"scheme", "objective", "clip", "map_steps"}}),
    ("decide", {"w": {"steps"}, "frozen": set(), "reconstruction": set(), "none": set(),
                "transport": {"scheme", "map_steps"}, "dropout": {"scheme", "map_steps"},
                "oracle": {"sources", "steps"}})])
def test_rows_differ_in_one_thing_alone(design, allowed):
    folder = REPOSITORY / "options" / design
    base = dataclasses.asdict(load_options(TrainOptions, str(folder / "base.yml")))
    others = {"base", "test", "matched", "images"}
    rows = {path.stem.partition("_")[0]: path for path in folder.glob("*.yml") if path.stem not in others}
    assert rows.keys() == allowed.keys() <= study.SEEDS.keys()
    for row, path in rows.items():
        options = dataclasses.asdict(load_options(TrainOptions, str(path)))
        assert {key for key in options if options[key] != base[key]} == allowed[row] | {"name"}


def test_tests_and_matched_scenes_are_of_trained_sources():
    for folder in study.DESIGNS.values():
        options = load_options(TrainOptions, str(REPOSITORY / folder / "base.yml"))
        matched = yaml.safe_load((REPOSITORY / folder / "matched.yml").read_text())["sets"]
        assert {images["name"] for images in matched} == {source.name for source in options.sources}
        held_out = {tuple(source.holdout_layers) for source in options.sources if source.layers}
        assert len(held_out) == 1 and held_out != {()}
        for name in ("test", "matched", "images"):
            path = REPOSITORY / folder / f"{name}.yml"
            for images in yaml.safe_load(path.read_text())["sets"] if path.exists() else ():
                if "layers" in images and not images["name"].startswith("oracle"):
                    assert {tuple(images["holdout_layers"])} == held_out
    assert set(study.LEFT_OUT) < {source.name for source in options.sources}


def test_a_bottleneck_restores_from_b_and_the_mean_of_r_alone():
    torch.manual_seed(0)
    net, degraded = Bottleneck(**NETWORK).eval(), torch.rand(2, 3, 24, 32)
    z, skips = net.encode(degraded)
    b = net.transport(z)
    restored = net.decode(b, z - b, skips)
    assert torch.equal(restored, net(degraded)[0]) and not any(skip.any() for skip in skips)
    shuffled = (z - b).flatten(2).flip(2).view_as(b)
    torch.testing.assert_close(net.decode(b, shuffled, skips), restored)
    assert not torch.allclose(net.decode(b, 0 * b, skips), restored)
    none = Bottleneck("none", **NETWORK)
    assert torch.equal(none.transport(z), z)
    dropping = Bottleneck(dropout=0.5, **NETWORK)
    given = torch.cat([b[:1]] * 40), torch.cat([(z - b)[:1]] * 40), [torch.cat([s[:1]] * 40) for s in skips]
    assert len(dropping.decode(*given).flatten(1).round(decimals=4).unique(dim=0)) == 2
    assert len(dropping.eval().decode(*given).flatten(1).round(decimals=4).unique(dim=0)) == 1


def test_a_frozen_map_passes_gradients_and_is_no_parameter():
    net = Bottleneck("frozen", **NETWORK)
    assert net.state_dict().keys() == BaryIR(**NETWORK).state_dict().keys()
    assert not any(name.startswith("transport_map") for name, _ in net.named_parameters())
    net(torch.rand(1, 3, 16, 16))[0].sum().backward()
    assert net.patch_embed.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kept", ["barycenter", "residual"])
def test_the_decoder_with_one_of_the_latents(tmp_path, kept):
    torch.manual_seed(0)
    net, degraded = BaryIR(**NETWORK), torch.rand(2, 3, 24, 40)
    save_checkpoint(tmp_path / "net.pth", {"net": net.state_dict(), "network": NETWORK})
    ablated = load_as(lambda **network: OneLatent(kept, **network), tmp_path / "net.pth")
    restored, z, b = ablated(degraded)
    latents = (b, 0 * b) if kept == "barycenter" else (0 * b, z - b)
    torch.testing.assert_close(restored, net.decode(*latents, net.encode(degraded)[1]))
    assert not torch.allclose(restored, net(degraded)[0])


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
    by_hand = np.mean([value for seed, *_, value in scores(3) if seed == 1])
    assert theirs.seeds[1] == pytest.approx(by_hand)
    for paired in (False, True):
        gain, low, high = interval(ours, theirs, paired)
        assert gain == pytest.approx(0.5, abs=0.2) and 0 < low < gain < high < 1
    gain, *ends = interval(effects(scores(1, 0.5)), theirs, False)
    assert gain > 0 and np.isnan(ends).all()                    # one seed says nothing about seeds
    difference, low, high = interval(theirs, theirs, False)
    assert difference == 0 and low < 0 < high


def test_an_image_in_two_sets_is_no_two_images():
    once = [score for score in scores(3) if score[1] == "x"]
    twice = once + [(seed, "y", image, value) for seed, _, image, value in once]
    for of_twice, of_once in zip(effects(twice), effects(once), strict=True):
        np.testing.assert_allclose(of_twice, of_once)


@pytest.mark.parametrize("seeds", [3, 8])
@pytest.mark.parametrize("paired", [False, True])
def test_intervals_hold_the_truth(seeds, paired):
    assert 0.94 <= coverage(seeds, paired, (0.3, 0.1, 0.3), draws=1500) <= 0.98


@pytest.fixture
def small_study(tmp_path: Path, monkeypatch) -> Path:
    """Rows of two tiny sources in the place of the option files: a plain network and arms of a bottleneck."""
    for n in range(3):
        write_image(tmp_path / f"data/clean/{n}.png", 48, 40, seed=n)
    trained = [{"name": f"seen_{name}", "clean": "clean", "degradation": "noise", "levels": [level]}
               for name, level in (("rain", 20), ("haze", 40))]
    sets = [*trained, {"name": "level_rain", "clean": "clean", "degradation": "noise", "levels": [60]},
            {"name": "mixed_haze", "degraded": "made/haze", "clean": "made/clean",
                       "degradation": "noise", "levels": [9]}]
    matched = [{**images, "name": images["name"][5:]} for images in trained]
    base = {"name": "base", "steps": 2, "batch": 2, "patch": 16, "workers": 0, "network": NETWORK,
            "scheme": "reconstruction", "learning_rate": 1e-2,
            "sources": [{"name": source, "clean": "clean", "degradation": "noise", "levels": [level]}
                        for source, level in (("rain", 10), ("haze", 30), ("noise", 20))]}
    made = [{"name": "clean", "clean": "clean", "degradation": "clean"},
            {"name": "haze", "clean": "clean", "degradation": "haze", "levels": [1]}]
    content = {"study/base": base | {"ema": 0.9}, "study/b_one": {"base": "base.yml", "name": "b_one"},
               "study/e_other": {"base": "b_one.yml", "name": "e_other", "scheme": "separate"},
               "study/test": {"name": "test", "checkpoint": "none", "sets": trained},
               "study/matched": {"name": "matched", "checkpoint": "none", "sets": matched},
               "decide/base": base, "decide/w": {"base": "base.yml"}, "decide/frozen": {"base": "base.yml"},
               "decide/transport": {"base": "base.yml", "scheme": "separate"},
               "decide/test": {"name": "test", "checkpoint": "none", "sets": sets},
               "decide/matched": {"name": "matched", "checkpoint": "none", "sets": matched},
               "decide/images": {"name": "images", "checkpoint": "none", "sets": made}}
    for name, options in content.items():
        (tmp_path / f"options/{name}.yml").parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / f"options/{name}.yml").write_text(yaml.safe_dump(options))
    monkeypatch.setattr(study, "DESIGNS", {name: tmp_path / "options" / name for name in study.DESIGNS})
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(study, "LEFT_OUT", ("noise",))
    monkeypatch.chdir(REPOSITORY)
    return tmp_path


def study_main(*arguments: object) -> None:
    study.main([str(argument) for argument in arguments])


def test_runs_and_tables(small_study, capsys):
    with pytest.raises(InputError, match="no runs.csv yet"):
        study.tables()
    where = ("--root", small_study / "data", "--output", small_study / "runs")
    study_main(*where, "--rows", "b", "e", "--seeds", 1)
    study_main(*where, "--rows", "b", "--seeds", 1, "--last")
    study_main(*where, "--rows", "w", "transport", "frozen", "--seeds", 2)
    capsys.readouterr()
    study_main(*where, "--tables")
    text = capsys.readouterr().out
    for words in ("e less b", "b, last less b", "transport less frozen", "transport: T off", "The claim",
                  "retrieval", "frozen: r of another source"):
        assert words in text
    assert not [line for line in text.splitlines() if "transport less" in line and "(one seed)" in line]
    runs = study.read(small_study / "results/runs.csv")
    assert [study.key(line) for line in runs if line["row"] == "b"] == [
        ("b", 3, 0, "averaged"), ("b", 3, 0, "last")]
    hashes = {(line["row"], line["seed"]): line["samples_hash"] for line in runs}
    assert hashes["b", "0"] == hashes["e", "0"]                 # same samples for all rows
    assert hashes["w", "0"] != hashes["transport", "0"] == hashes["frozen", "0"] != hashes["frozen", "1"]
    images = study.read(small_study / "results/images.csv")
    of_e, (of_set,) = ([float(line["psnr"]) for line in lines if line["set"] == "seen_rain"
                        and study.key(line) == ("e", 3, 0, "averaged")]
                       for lines in (images, study.read(small_study / "results/sets.csv")))
    assert len(of_e) == 3 and of_set == pytest.approx(np.mean(of_e), abs=1e-3)
    study.collect(small_study / "nowhere")                      # what is there stays
    assert study.read(small_study / "results/runs.csv") == runs
    nets = {row: torch.load(small_study / f"runs/{row}_0/last.pth")["net"]
            for row in ("w", "frozen", "transport")}
    of_map = {row: net["transport_map.0.norm1.weight"] for row, net in nets.items()}
    assert torch.equal(of_map["frozen"], of_map["w"]) and not torch.equal(of_map["transport"], of_map["w"])
    assert not torch.equal(nets["frozen"]["patch_embed.weight"], nets["w"]["patch_embed.weight"])
    with pytest.raises(InputError, match="no row x, expected some of w, transport"):
        study_main(*where, "--rows", "x")


def test_a_signal_stops_and_saves(small_study, tmp_path):
    path = tmp_path / "options/study/b_one.yml"
    path.write_text(yaml.safe_dump({"base": "base.yml", "name": "b_one", "steps": 100_000}))
    driver = ("import sys; from pathlib import Path; from benchmarks import study; "
              "from utils.errors import one_line_errors; study.RESULTS = Path(sys.argv[1]) / 'results'; "
              "study.DESIGNS = {'study': Path(sys.argv[1]) / 'options/study'}\n"
              "with one_line_errors(): study.main(['--root', sys.argv[1] + '/data', '--rows', 'b', "
              "'--output', sys.argv[1] + '/runs'])")
    process = subprocess.Popen([sys.executable, "-c", driver, tmp_path], cwd=REPOSITORY,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in process.stdout:
        if b" parameters, " in line:
            break
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0].decode()
    assert process.returncode and "saved, continue with --resume" in output, output
    assert (tmp_path / "runs/b_0/last.pth").exists()
    assert (tmp_path / "runs/b_0/cpu_seconds.txt").exists() and "Traceback" not in output
