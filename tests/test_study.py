"""The study: equal conditions of its rows, its statistics on what is known, a run from begin to end."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks import study
from conftest import REPOSITORY, write_image
from utils.errors import InputError
from utils.options import TrainOptions, load_options

NETWORK = {"width": 8, "encoder_blocks": [1, 1], "latent_blocks": 1, "transport_blocks": 1,
           "decoder_blocks": [1, 1], "residual_blocks": [1], "refinement_blocks": 0, "heads": [1, 2, 4]}


def test_rows_differ_in_one_thing_alone():
    # d: the objective's weight, distance, penalty; the clip grows with the weight; one step of T a batch.
    allowed = {"a": {"scheme", "network"}, "b": {"scheme", "network"}, "c": {"scheme"},
               "d": {"scheme", "objective", "potentials", "clip", "map_steps"},
               "e": set(), "f": {"objective"}, "g": {"network"}, "h": {"network"},
               "i": {"map_steps"}, "j": {"network"}, "k": {"potential_learning_rate"}}
    allowed["l"] = allowed["d"]
    base = dataclasses.asdict(load_options(TrainOptions, str(REPOSITORY / "options/study/base.yml")))
    files = sorted((REPOSITORY / "options/study").glob("[a-z]_*.yml"))
    assert [path.stem[0] for path in files] == list(allowed)
    for path in files:
        options = dataclasses.asdict(load_options(TrainOptions, str(path)))
        assert {key for key in options if options[key] != base[key]} == allowed[path.stem[0]] | {"name"}


def test_difference_of_a_known_gain():
    rng = np.random.default_rng(0)
    theirs = {name: 30 + rng.normal(size=(3, 40)) * 0.1 + rng.normal(size=40) * 5 for name in ("x", "y")}
    ours = {name: values + 0.5 for name, values in theirs.items()}
    gain, low, high = study.difference(ours, theirs, ["x", "y"], rng)
    assert gain == pytest.approx(0.5) and 0.3 < low < 0.5 < high < 0.7
    nothing, low, high = study.difference(theirs, theirs, ["x", "y"], rng)
    assert nothing == 0 and low < 0 < high


@pytest.mark.parametrize(("count", "names", "batch", "last"), [
    (2, ["haze", "rain"], 20, 4), (3, ["haze", "noise", "rain"], 21, 6),
    (4, ["haze", "lowlight", "noise", "rain"], 20, 4)])
def test_runs_of_the_curve_have_the_first_sources(count, names, batch, last):
    file = str(REPOSITORY / "options/study/e_separate.yml")
    options = load_options(TrainOptions, file, study.first_sources(file, count))
    all_of_them = load_options(TrainOptions, file)
    assert sorted({source.source for source in options.sources}) == names
    assert options.sources == [source for source in all_of_them.sources if source.source in names]
    assert (options.batch, options.progressive) == (batch, [[1600, last, 128]])
    changed = {name for name, value in vars(options).items() if value != getattr(all_of_them, name)}
    assert changed <= {"sources", "batch", "progressive"}


@pytest.fixture
def small_study(tmp_path: Path, monkeypatch) -> Path:
    """Two rows of two tiny sources, in the place of options/study."""
    for n in range(5):
        write_image(tmp_path / f"data/clean/{n}.png", 48, 40, seed=n)
    sets = [{"name": name, "clean": "clean", "degradation": "noise", "levels": [level]}
            for name, level in (("seen_noise", 20), ("type_noise", 40))]
    base = {"name": "base", "steps": 2, "batch": 2, "patch": 16, "workers": 0, "network": NETWORK,
            "potentials": {"width": 4}, "scheme": "reconstruction",
            "sources": [{"source": f"{level}", "clean": "clean", "degradation": "noise", "levels": [level]}
                        for level in (10, 30)]}
    content = {"base": base, "b_one": {"base": "base.yml", "name": "b_one"},
               "e_other": {"base": "b_one.yml", "name": "e_other", "scheme": "separate"},
               "test": {"name": "test", "checkpoint": "none", "sets": sets},
               "matched": {"name": "matched", "checkpoint": "none", "sets": sets}}
    for name, options in content.items():
        (tmp_path / f"options/{name}.yml").parent.mkdir(exist_ok=True)
        (tmp_path / f"options/{name}.yml").write_text(yaml.safe_dump(options))
    monkeypatch.setattr(study, "OPTIONS", tmp_path / "options")
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(study, "ORDER", ("30", "10"))
    monkeypatch.chdir(REPOSITORY)
    return tmp_path


def test_runs_and_tables(small_study):
    with pytest.raises(InputError, match="no runs.csv yet"):
        study.tables()
    for name, sources in (("b_one", 1), ("b_one", 2), ("e_other", 2)):
        study.run(name, 0, sources, str(small_study / "data"), small_study / "runs")
    study.collect(small_study / "runs")
    text = study.tables()
    assert [line.split()[2] for line in text.splitlines() if line.startswith("the first")] == ["2"]
    assert "e_other" in text and "type_noise" in text and "retrieval" in text
    assert "difference to e_other" in study.tables("e")
    with pytest.raises(InputError, match="--baseline x: no run of that row, expected one of b, e"):
        study.tables("x")
    runs = study.read(small_study / "results/runs.csv")
    assert [study.key(line) for line in runs] == [("b", 1, 0), ("b", 2, 0), ("e", 2, 0)]
    fewer, *hashes = [line["samples_hash"] for line in runs]
    assert fewer != hashes[0] == hashes[1]                      # same samples for all rows
    of_e = [line for line in study.read(small_study / "results/images.csv")
            if study.key(line) == ("e", 2, 0)]
    by_set = [float(line["psnr"]) for line in of_e if line["set"] == "seen_noise"]
    row = next(line for line in study.read(small_study / "results/sets.csv")
               if study.key(line) == ("e", 2, 0))
    assert len(by_set) == 5 and row["group"] == "seen"
    assert float(row["psnr"]) == pytest.approx(np.mean(by_set))
    study.collect(small_study / "nowhere")                      # what is there stays
    assert study.read(small_study / "results/runs.csv") == runs


def test_a_signal_stops_and_saves(small_study, tmp_path):
    (tmp_path / "options/b_one.yml").write_text(yaml.safe_dump({"base": "base.yml", "name": "b_one",
                                                                "steps": 100_000}))
    driver = ("import sys; from pathlib import Path; from benchmarks import study; "
              "from utils.errors import one_line_errors; "
              "study.OPTIONS = Path(sys.argv[1]); study.pass_on_signals()\n"
              "with one_line_errors(): study.run('b_one', 0, 5, sys.argv[2], Path(sys.argv[3]))")
    command = [sys.executable, "-c", driver, tmp_path / "options", tmp_path / "data", tmp_path / "runs"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in process.stdout:
        if b" parameters, " in line:
            break
    time.sleep(3)
    process.terminate()
    process.terminate()                                         # as a group and its parent send it: twice
    output = process.communicate(timeout=120)[0].decode()
    assert process.returncode and "saved, continue with --resume" in output, output
    assert (tmp_path / "runs/b_one_0/last.pth").exists()
    assert (tmp_path / "runs/b_one_0/cpu_seconds.txt").exists() and "Traceback" not in output
