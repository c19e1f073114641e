"""train.py end to end: the two phases, interruption and resume, errors, several processes."""

import functools
import multiprocessing
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Container
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml

import data.datasets
import train
from benchmarks.faults import same_state as same
from benchmarks.faults import start_training
from conftest import TINY_NETWORK, read_csv, write_image, write_yaml
from conftest import train_tiny as run
from utils import runs
from utils.errors import InputError
from utils.evaluation import precision_on
from utils.files import cut_table, write_csv

OPTIONS = {
    "name": "run", "steps": 6, "batch": 2, "patch": 16, "workers": 0, "log_every": 1, "save_every": 100,
    "optimizer": "adamw", "learning_rate": 1e-3, "ema": 0.9, "schedule": "cosine", "warmup": 2,
    "sources": [
        {"name": "noise", "bundled": ["coffee.png"], "degradation": "noise", "levels": [15, 50], "repeat": 3},
        {"name": "dark", "bundled": ["coffee.png"], "degradation": "lowlight", "levels": [3], "repeat": 4}],
}
VALIDATED = {"sets": [{"name": "noise_25", "bundled": ["chessboard_RGB.png"], "degradation": "noise",
                       "levels": [25]}]}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Runs go to out/NAME of the test's own folder; signal handlers are put back, processes ended."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for process in multiprocessing.active_children():
        process.kill()


def option_file(**changes) -> str:
    return write_yaml(Path.cwd() / "some.yml", {**OPTIONS, "output": str(Path.cwd() / "out"), **changes})


def refused(message: str, opt: str, *arguments: str, **changes: object) -> None:
    with pytest.raises(InputError, match=message):
        run(opt, *arguments, **changes)


def start(opt: str, *changes: str, **environment: str) -> BaseProcess:
    """A run in a process of its own; what it prints goes to output.txt."""
    command = ["--opt", opt, "--set", *TINY_NETWORK, *changes]
    return start_training(command, Path.cwd() / "output.txt", **environment)


def saved(name: str = "run", file: str = "last.pth") -> dict:
    return torch.load(f"out/{name}/{file}", weights_only=True)


def state(name: str = "run", file: str = "last.pth") -> dict:
    return saved(name, file)["train"]


def log() -> str:
    return Path("out/run/train.log").read_text()


def losses(name: str = "run") -> list[dict[str, str]]:
    return read_csv(Path(f"out/{name}/losses.csv"))


def contents(name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path("out", name).glob("*.*")}


def wait_for(path: str, process: BaseProcess, lines: int = 0) -> None:
    """Until a file has more than so many lines."""
    while process.is_alive() and not (Path(path).exists() and Path(path).read_bytes().count(b"\n") > lines):
        time.sleep(0.05)


def make_nan(patch: pytest.MonkeyPatch, objective: str, calls: Container[int]) -> None:
    """Have an objective of train.py be nan at some of its calls, which are counted from 1."""
    right, made = getattr(train.barycenter, objective), []

    def sometimes_nan(*arguments) -> torch.Tensor:
        made.append(right(*arguments))
        return made[-1] * torch.nan if len(made) in calls else made[-1]

    patch.setattr(train.barycenter, objective, sometimes_nan)


def test_each_phase_moves_only_its_own_parameters(monkeypatch):
    """A run of one step without its potential step, and with it: the potentials alone differ."""
    opt = option_file(steps=1, schedule="constant")
    with monkeypatch.context() as patch:
        patch.setattr(train, "potential_step", lambda *_: {})
        run(opt, name="map_only")
    run(opt, name="both")
    map_only, both = state("map_only"), state("both")
    torch.manual_seed(0)
    initial_net = train.BaryIR(**saved("both")["network"]).state_dict()
    moved = [name for name in initial_net if not torch.equal(initial_net[name], both["net"][name])]
    assert len(moved) > 0.95 * len(initial_net)                     # the first step moves (nearly) everything
    assert same(map_only["net"], both["net"])                       # the potential step moved none of it
    assert map_only["potential_optimizer"]["state"] == {}           # the map step moved no potential
    before, after = map_only["potentials"], both["potentials"]
    assert {name for name in after if not torch.equal(before[name], after[name])} == set(after)


def test_scheme_separate_moves_each_side_by_its_own_objective():
    """T and potentials do not see the targets, encoder and decoder not the potentials."""
    opt = option_file(steps=1, scheme="separate", map_steps=3, schedule="constant", ema=0)
    run(opt, name="first")
    run(opt, name="other_potentials", potential_learning_rate=0.1, map_steps=1)
    run(opt, name="other_rate", learning_rate=0.01)
    first, other_potentials, other_rate = map(state, ("first", "other_potentials", "other_rate"))
    torch.manual_seed(0)
    initial, net = train.BaryIR(**saved("first")["network"]).state_dict(), first["net"]
    of_map = {name for name in initial if name.startswith("transport_map.")}
    assert {name for name in initial if not torch.equal(initial[name], net[name])} == set(initial)
    assert all(torch.equal(net[name], other_rate["net"][name]) == (name in of_map) for name in initial)
    assert same(first["potentials"], other_rate["potentials"])
    assert not any(torch.equal(net[name], other_potentials["net"][name]) for name in of_map)
    steps = {name: first[f"{name}_optimizer"]["state"][0]["step"]
             for name in ("restoration", "transport", "potential")}
    assert steps == {"restoration": 1, "transport": 3, "potential": 1}
    assert first["potentials"]["standardize.steps"] == 1


@pytest.mark.parametrize("scheme", [
    {"scheme": "joint"}, {"scheme": "separate", "map_steps": 2, "balanced": True, "clean_share": 0.2}])
def test_interrupted_run_resumes_bit_by_bit(monkeypatch, scheme):
    """A signal in the middle of an epoch, then --resume, equals the run that was left alone."""
    module, objective = train.barycenter, train.barycenter.dual_objective       # here, one that draws numbers
    monkeypatch.setattr(module, "dual_objective", lambda *given: objective(*given) * (1 + torch.rand(())))
    opt = option_file(save_every=4, validation={"every": 3, **VALIDATED}, **scheme)
    run(opt, name="whole")
    table, append_row = Path("out/run/losses.csv").absolute(), runs.append_row

    def interrupt(path: Path, row: tuple) -> None:
        append_row(path, row)
        if path == table and row[0] == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "append_row", interrupt)
        message = "stopped by SIGTERM at step 3 of 6: saved, continue with --resume"
        with pytest.raises(InputError, match=message) as stopped:
            run(opt)
    assert stopped.value.status == 128 + signal.SIGTERM and saved()["step"] == 3
    append_row(table, [4, *list(losses()[-1].values())[1:]])        # as if killed later, after more logging

    run(opt, "--resume")
    whole, resumed = state("whole"), state()
    assert [key for key in whole if not same(whole[key], resumed[key])] == ["options"]      # their names
    for name, columns in (("losses.csv", ("step", *runs.TERMS)), ("validation.csv", ("step", "set", "psnr"))):
        ours, theirs = ([[row[column] for column in columns] for row in read_csv(Path("out", folder, name))]
                        for folder in ("run", "whole"))
        assert ours == theirs
    assert [row["step"] for row in losses()] == list("123456") and Path("out/run/best.pth").exists()
    averaged = {f"module.{name}": weight for name, weight in saved()["net"].items()}        # offered for use
    assert same(averaged | {"n_averaged": resumed["ema"]["n_averaged"]}, resumed["ema"])


def test_signal_to_the_process_group_saves_though_workers_load():
    """Ctrl-C in a terminal and torchrun's SIGTERM go to the workers, too: none dies before the checkpoint."""
    process = start(option_file(steps=100_000, workers=1))
    wait_for("out/run/losses.csv", process, lines=3)
    os.killpg(process.pid, signal.SIGTERM)
    process.join(60)
    printed = Path("output.txt").read_text()
    assert process.exitcode == 128 + signal.SIGTERM and "Traceback" not in printed, printed
    message = r"error: stopped by SIGTERM at step \d+ of 100000: saved, continue with --resume\n$"
    assert re.search(message, printed) and saved()["step"] >= 3


def test_a_second_interrupt_ends_at_once(monkeypatch):
    """A Ctrl-C a second after the first does not wait for the step to end and be saved."""
    options = train.load_options(train.TrainOptions, option_file())
    watched = runs.Run(options, False, torch.device("cpu"))
    watched.watch_signals()
    monkeypatch.setattr(runs.time, "monotonic", mock.Mock(side_effect=[10.0, 10.5, 10.6, 12.0]))
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)                              # torchrun's own, after the terminal's
    assert watched.stop_requested(1)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_what_does_not_fit_the_network_is_named(checkpoint):
    for change, message in (
        ({"objective.lambdas": [1, 2, 3]}, r"some.yml: objective.lambdas: \[1.0, 2.0, 3.0\], expected inv"),
        ({"pretrained": "nowhere.pth"}, "nowhere.pth: no such checkpoint"),
        ({"pretrained": checkpoint}, r"pretrained: .*net.pth: 11 of \d+ tensors do not fit the network "
         r"\(refinement.0.\S*: \[.*\], expected none; [^;]*; [^;]*; \.\.\.\)$"),
    ):
        refused(message, option_file(), "--dry-run", **change)


def test_a_resumed_table_keeps_its_columns_apart(tmp_path):
    """Columns by name, in the present order; rows without a column have nan there."""
    table = tmp_path / "losses.csv"
    write_csv(table, [["step", "a", "old", "b"], [1, 10, 7, 20], [2, 11, 8, 21], [3, 12, 9, 22]])
    cut_table(table, ("step", "b", "a", "new"), step=2)
    rows = [list(row.values()) for row in read_csv(table)]
    assert rows == [["1", "20", "10", "nan"], ["2", "21", "11", "nan"]]


def test_resume_with_other_options():
    """Batch times processes places a run among its samples; the same product in another way is no change."""
    opt = option_file(steps=1, validation={"every": 1, **VALIDATED})
    run(opt)
    before, best = contents("run")["last.pth"], state()["best"]
    for change, message in (
        ({"ema": 0.5}, "some.yml, since .*last.pth: ema: 0.9 -> 0.5"),
        ({"scheme": "separate"}, "scheme: joint -> separate"), ({"seed": 1}, "seed: 0 -> 1"),
        ({"sources.1.levels": [4]}, r"sources\[1\].levels: \[3.0\] -> \[4.0\]"),
        ({"objective.gamma": 0}, "objective.gamma: 0.05 -> 0.0"), ({"batch": 4}, "samples_per_step: 2 -> 4"),
        ({"clean_share": 0.1}, "clean_share: 0.0 -> 0.1"), ({"sources": OPTIONS["sources"][:1]}, "2 -> 1"),
    ):
        refused(message, opt, "--resume", **change)
    assert contents("run")["last.pth"] == before
    run(opt, "--resume", "--dry-run")                               # of a run that is done
    run(opt, "--resume", **{"steps": 2, "validation.every": 100, "learning_rate": 0.5})
    assert state()["best"] == best > 0                              # a worse network is no new best one
    assert "; changed steps: 1 -> 2; changed" in log() and "; changed learning_rate: 0.001 -> 0.5" in log()
    run(opt, "--resume", steps=3, **{"validation.sets.0.levels": [90]})
    assert 0 < state()["best"] < best                               # that was of other sets


def test_resume_takes_the_newest_checkpoint_that_can_be_read():
    """Damaged after it was written, or lost between the renames: the one before; the run ends the same."""
    opt = option_file(steps=4, save_every=1)
    run(opt)
    whole, folder = state(), Path("out/run")
    assert saved(file="previous.pth")["step"] == 3
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:5000]), Path.unlink):
        damage(folder / "last.pth")
        (folder / ".partial-abc.pth").write_bytes(b"a kill in the middle of a write")
        refused("holds a run already", opt)
        run(opt, "--resume")
        assert same(state(), whole) and not list(folder.glob(".partial*"))
        assert saved(file="previous.pth")["step"] == 3              # never replaced by the damaged one
    assert "last.pth: cannot be read as a checkpoint (BadZipFile), expected a file of train.py; t" in log()
    for name in ("last.pth", "previous.pth"):
        (folder / name).write_bytes((folder / name).read_bytes()[:5000])
    refused("previous.pth: cannot be read as a checkpoint", opt, "--resume")


def test_a_run_neither_overwrites_another_nor_goes_on_from_none(checkpoint):
    """Without a checkpoint it begins anew, with its pretrained weights."""
    opt, first = option_file(steps=1), Path("out/first/last.pth")
    run(opt, name="first")
    kept, content = contents("first"), saved("first")
    refused("first holds a run already: continue it with --resume, or give", opt, name="first")
    refused("--resume: no run .*other, expected the name of one that was", opt, "--resume", name="other")
    assert contents("first") == kept
    Path("out/run").mkdir()                                         # killed before its first checkpoint
    run(opt, "--resume", pretrained=first, learning_rate=1e-30)
    assert "holds no checkpoint yet: the run begins anew" in log()
    assert torch.equal(*(saved(name)["net"]["patch_embed.weight"] for name in ("first", "run")))
    content["train"]["potentials"] = {"g": torch.zeros(3)}
    torch.save(content, first)
    refused(r"last.pth: cannot be resumed from \(Error\(s\) in loading state_dict for Potentials", opt,
            "--resume", name="first", steps=2)
    first.write_bytes(checkpoint.read_bytes())
    refused("last.pth: has no 'train', expected a checkpoint of train.py to resume from", opt, "--resume",
            name="first")


def test_a_folder_is_locked_before_anything_is_written(monkeypatch):
    """By another process; a file system without locks is no obstacle."""
    opt, folder = option_file(cache=True, steps=1), Path("out/run")
    folder.mkdir(parents=True)
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(); input()"
    other = subprocess.Popen([sys.executable, "-c", code, folder / ".lock"], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    other.stdout.readline()
    refused("out/run: another process trains there, expected another name", opt)
    assert [path.name for path in folder.iterdir()] == [".lock"]
    other.communicate(b"\n")
    monkeypatch.setattr("fcntl.lockf", mock.Mock(side_effect=OSError(37, "No locks available")))
    run(opt)
    assert "cannot be locked ([Errno 37] No locks available): do not train there twice" in log()


@pytest.mark.parametrize("objective", ["dual_objective", "potential_objective"])
def test_steps_that_are_not_finite_are_left_out(monkeypatch, objective):
    """Step 3 of 6 is not applied, is counted and is no part of the means; the others go on."""
    make_nan(monkeypatch, objective, [3])
    run(option_file(log_every=3))
    assert saved()["step"] == 6 and all(weight.isfinite().all() for weight in state()["net"].values())
    first, second = losses()
    assert (first["skipped"], second["skipped"]) == ("1", "0")
    assert all(first[name] != "nan" for name in ("map_loss", "potential_loss", "gradient_norm"))
    map_loss, error, dual = (float(second[name]) for name in ("map_loss", "reconstruction", "dual"))
    assert map_loss == pytest.approx(1e4 * error + dual, rel=1e-4)              # w_rec of the paper
    assert "step 3: 1 not applied since the last reading, loss or gradient not finite" in log()


def test_a_series_of_steps_that_are_not_finite_ends_the_run(monkeypatch):
    make_nan(monkeypatch, "dual_objective", range(3, 9))
    monkeypatch.setattr(runs, "NOT_APPLIED", 3)
    refused("step 5: loss or gradient not finite, 3 steps in a row; the last good checkpoint is .*last.pth",
            option_file(steps=8, save_every=2, log_every=5))
    assert saved()["step"] == 4
    first, last = state(file="previous.pth"), state()               # of step 2
    assert same(first["net"], last["net"])
    assert same(first["map_optimizer"]["state"], last["map_optimizer"]["state"])


def test_a_full_disk_ends_the_run_in_one_line():
    """A file may have 1 MB: the checkpoint has more. With room again, the run goes on."""
    opt, limits = option_file(steps=3, save_every=2), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large: '.*/out/run/last.pth'"):
            run(opt)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not any(name.endswith(".pth") or name.startswith(".partial") for name in os.listdir("out/run"))
    run(opt, "--resume")


@pytest.mark.parametrize("killed", [True, False])
def test_what_ends_a_worker_is_named(public_tree, monkeypatch, killed):
    low = write_image(public_tree / "Train/lowlight/low/2.png", 200, 200)
    low.write_bytes(low.read_bytes()[:20000])
    message = r"low/2.png: cannot be read as an image \(.*\)"
    if killed:
        monkeypatch.setattr(data.datasets, "read_image", lambda path: os.kill(os.getpid(), signal.SIGKILL))
        message = r"a worker died \((killed by signal: Killed|exited unexpectedly)\) while it read an image, "
    source = {"name": "lowlight", "degraded": "Train/lowlight/low", "clean": "Train/lowlight/high"}
    refused(message, option_file(root=str(public_tree), sources=[source], workers=1))


def test_two_processes_train_as_one_and_end_together():
    """On gloo, batch 1 each, as one with batch 2; when one dies, the other ends; one process goes on."""
    opt = option_file(steps=3, save_every=3, optimizer="rmsprop", learning_rate=1e-5, ema=0,
                      schedule="constant")
    run(opt, name="one")
    with socket.create_server(("localhost", 0)) as server:
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(server.getsockname()[1])}
    pair = [start(opt, "name=two", "batch=1", "steps=100000", WORLD_SIZE="2", RANK=str(rank),
                  LOCAL_RANK=str(rank), **address) for rank in (0, 1)]
    wait_for("out/two/last.pth", pair[0])
    pair[1].kill()
    pair[0].join(60)
    errors = Path("output.txt").read_text()
    assert pair[0].exitcode == 1 and re.search("error: process 0: another process ended", errors), errors
    for first, second in zip(losses("one"), losses("two")[:3], strict=True):
        for term in ("map_loss", "reconstruction", "distance", "contrastive", "orthogonality", "potential",
                     "gradient_norm", "potential_loss", "potential_gradient_norm"):
            expected = pytest.approx(float(second[term]), rel=2e-4, abs=1e-5)
            assert float(first[term]) == expected, (first["step"], term)
    step = saved("two")["step"]
    run(opt, "--resume", name="two", batch=2, steps=step + 1)
    assert saved("two")["step"] == step + 1


@pytest.mark.parametrize("precision", ["bfloat16", "auto"])
def test_penalty_and_other_options_run(monkeypatch, precision):
    """Precision auto is resolved to what the processor computes, not read as float32."""
    weighed, module, weights_of = [], train.barycenter, train.barycenter.sample_weights
    monkeypatch.setattr(module, "sample_weights", lambda *given: weighed.append(given) or weights_of(*given))
    run(option_file(steps=2, optimizer="rmsprop", precision=precision, ema=0.0, clip=1.0, clean_share=0.2,
                    progressive=[[1, 1, 24]], schedule=0.1, warmup=0,
                    objective={"lambdas": [1, 3], "penalty": 10}))
    first, second = losses()
    assert float(first["learning_rate"]) == 1e-3 and float(second["learning_rate"]) < 1e-3
    assert {name for row in (first, second) for name in runs.TERMS if row[name] == "nan"} == {
        "transport_gradient_norm"}
    resolved = yaml.safe_load(Path("out/run/options.yml").read_text())["precision"]
    assert resolved == precision_on(torch.device("cpu"), precision) != "auto"
    source, lambdas, drawn = weighed[0]                             # of 3 and 4 samples, a fifth clean
    assert lambdas.tolist() == [0.25, 0.75] and drawn.tolist() == pytest.approx([0.8 * 3 / 7, 0.8 * 4 / 7])
    optimizer = state()["map_optimizer"]
    assert optimizer["param_groups"][0]["lr"] == pytest.approx(float(second["learning_rate"]), rel=1e-2)
    squares = sum(float(kept["square_avg"].sum()) for kept in optimizer["state"].values())
    assert squares == pytest.approx(0.99 * 0.01 + 0.01, rel=1e-2)   # of two gradients of norm 1


def test_the_average_of_weights_forgets_the_first():
    averaged, average, expected = [torch.zeros(1)], functools.partial(train.growing_average, decay=0.9), 0.0
    for step in range(1, 120):
        average(averaged, [torch.full((1,), float(step))], torch.tensor(step))
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert averaged[0].item() == pytest.approx(expected, rel=1e-5) and expected > 105
