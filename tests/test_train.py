"""train.py end to end: the two phases, interruption and resume, errors, several processes."""

import csv
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from dataclasses import fields
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import yaml

import data.datasets
import train
from benchmarks.faults import same_state as same
from benchmarks.faults import start_training
from conftest import TINY_NETWORK, write_image
from utils import runs
from utils.errors import InputError
from utils.evaluation import precision_on
from utils.files import cut_table, write_csv


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


OPTIONS = {
    "name": "run", "steps": 6, "batch": 2, "patch": 16, "workers": 0, "log_every": 1, "save_every": 100,
    "optimizer": "adamw", "learning_rate": 1e-3, "ema": 0.9, "schedule": "cosine", "warmup": 2,
    "sources": [
        {"name": "noise", "bundled": ["coffee.png"], "degradation": "noise", "levels": [15, 50],
         "repeat": 3},
        {"name": "lowlight", "bundled": ["coffee.png"], "degradation": "lowlight", "levels": [3],
         "repeat": 4},
    ],
}
VALIDATED = {"sets": [{"name": "noise_25", "bundled": ["chessboard_RGB.png"], "degradation": "noise",
                       "levels": [25]}]}


def option_file(tmp_path: Path, **changes) -> str:
    path = tmp_path / "some.yml"
    path.write_text(yaml.safe_dump({**OPTIONS, "output": str(tmp_path / "out"), **changes}))
    return str(path)


def run(opt: str, *arguments: str) -> None:
    train.main(["--opt", opt, *arguments, "--set", *TINY_NETWORK])


def start(tmp_path: Path, opt: str, *arguments: str, **environment: str) -> BaseProcess:
    """The same in a process of its own; what it prints goes to output.txt."""
    return start_training(["--opt", opt, *arguments, "--set", *TINY_NETWORK], tmp_path / "output.txt",
                          **environment)


def saved(tmp_path: Path, name: str = "run", file: str = "last.pth") -> dict:
    return torch.load(tmp_path / "out" / name / file, weights_only=True)


def state(tmp_path: Path, name: str = "run") -> dict:
    return saved(tmp_path, name)["train"]


def log(tmp_path: Path, name: str = "run") -> str:
    return (tmp_path / "out" / name / "train.log").read_text()


def rows(path: Path) -> list[dict]:
    return list(csv.DictReader(path.read_text().splitlines()))


def wait_for(path: Path, process: BaseProcess, lines: int = 0) -> None:
    """Until a file has more than so many lines."""
    while process.is_alive() and not (path.exists() and len(path.read_bytes().splitlines()) > lines):
        time.sleep(0.05)


def test_precision_auto_is_what_the_processor_computes(tmp_path):
    run(option_file(tmp_path, steps=1, precision="auto"))
    saved = yaml.safe_load((tmp_path / "out/run/options.yml").read_text())
    assert saved["precision"] == precision_on(torch.device("cpu"), "auto") != "auto"


def test_each_phase_moves_only_its_own_parameters(tmp_path, monkeypatch):
    """A run of one step without its potential step, and with it: the potentials alone differ."""
    opt = option_file(tmp_path, steps=1, schedule="constant")
    with monkeypatch.context() as patch:
        patch.setattr(train, "potential_step", lambda *_: {})
        run(opt, "--set", "name=map_only")
    run(opt, "--set", "name=both")
    map_only, both = state(tmp_path, "map_only"), state(tmp_path, "both")
    torch.manual_seed(0)
    initial_net = train.BaryIR(**saved(tmp_path, "both")["network"]).state_dict()
    moved = [name for name in initial_net if not torch.equal(initial_net[name], both["net"][name])]
    assert len(moved) > 0.95 * len(initial_net)                     # the first step moves (nearly) everything
    assert same(map_only["net"], both["net"])                       # the potential step moved none of it
    assert map_only["potential_optimizer"]["state"] == {}           # the map step moved no potential
    before, after = map_only["potentials"], both["potentials"]
    assert {name for name in after if not torch.equal(before[name], after[name])} == set(after)


def test_scheme_separate_moves_each_side_by_its_own_objective(tmp_path):
    """T and potentials do not see the targets, encoder and decoder not the potentials."""
    opt = option_file(tmp_path, steps=1, scheme="separate", map_steps=3, schedule="constant", ema=0)
    runs = {"first": [], "other_potentials": ["potential_learning_rate=0.1", "map_steps=1"],
            "other_rate": ["learning_rate=0.01"]}
    for name, changes in runs.items():
        run(opt, "--set", f"name={name}", *changes)
    first, other_potentials, other_rate = (state(tmp_path, name) for name in runs)
    torch.manual_seed(0)
    initial, net = train.BaryIR(**saved(tmp_path, "first")["network"]).state_dict(), first["net"]
    of_map = {name for name in initial if name.startswith("transport_map.")}
    assert {name for name in initial if not torch.equal(initial[name], net[name])} == set(initial)
    assert all(torch.equal(net[name], other_rate["net"][name]) == (name in of_map) for name in initial)
    assert same(first["potentials"], other_rate["potentials"])
    assert not any(torch.equal(net[name], other_potentials["net"][name]) for name in of_map)
    steps = {name: first[f"{name}_optimizer"]["state"][0]["step"]
             for name in ("restoration", "transport", "potential")}
    assert steps == {"restoration": 1, "transport": 3, "potential": 1}
    assert first["potentials"]["standardize.steps"] == 1


def test_scheme_separate_resumes_bit_by_bit(tmp_path):
    opt = option_file(tmp_path, steps=6, scheme="separate", map_steps=2, balanced=True, clean_share=0.2,
                      save_every=4)
    run(opt)
    whole, folder = state(tmp_path), tmp_path / "out/run"
    (folder / "previous.pth").rename(folder / "last.pth")          # of step 4
    run(opt, "--resume")
    assert same(state(tmp_path), whole)


def test_interrupted_run_resumes_bit_by_bit(tmp_path, monkeypatch):
    """A signal in the middle of an epoch, then --resume, equals the run that was left alone."""
    opt = option_file(tmp_path, save_every=4, validation={"every": 3, **VALIDATED})
    run(opt, "--set", "name=whole")

    table, append_row = tmp_path / "out/run/losses.csv", runs.append_row

    def interrupt(path: Path, row: tuple) -> None:
        append_row(path, row)
        if path == table and row[0] == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "append_row", interrupt)
        message = "stopped by SIGTERM at step 3 of 6: saved, continue with --resume"
        with pytest.raises(InputError, match=message) as stopped:
            run(opt)
    assert stopped.value.status == 128 + signal.SIGTERM and saved(tmp_path)["step"] == 3
    append_row(table, (4, *["0"] * 10))                             # as if killed later, after more logging

    torch.rand(7)                                                   # a new process has another random state
    run(opt, "--resume")
    whole, resumed = state(tmp_path, "whole"), state(tmp_path)
    assert [key for key in whole if not same(whole[key], resumed[key])] == ["options"]      # their names
    for name, columns in (("losses.csv", runs.TERMS), ("validation.csv", ("step", "set", "psnr"))):
        ours, theirs = (rows(tmp_path / "out" / folder / name) for folder in ("run", "whole"))
        if name == "losses.csv":                                    # means over log_every steps, 1 here
            assert [row["step"] for row in ours] == [str(step) for step in range(1, 7)]
        assert [[row[c] for c in columns] for row in ours] == [[row[c] for c in columns] for row in theirs]
    assert (tmp_path / "out/run/best.pth").exists()


def test_signal_to_the_process_group_saves_though_workers_load(tmp_path):
    """Ctrl-C in a terminal and torchrun's SIGTERM go to the workers, too: none dies before the checkpoint."""
    process = start(tmp_path, option_file(tmp_path, steps=100_000, workers=1))
    wait_for(tmp_path / "out/run/losses.csv", process, lines=3)
    os.killpg(process.pid, signal.SIGTERM)
    process.join(60)
    printed = (tmp_path / "output.txt").read_text()
    assert process.exitcode == 128 + signal.SIGTERM and "Traceback" not in printed, printed
    message = r"error: stopped by SIGTERM at step \d+ of 100000: saved, continue with --resume\n$"
    assert re.search(message, printed) and saved(tmp_path)["step"] >= 3


@pytest.mark.parametrize("restart", ["--resume", "torchrun"])
def test_a_run_without_a_checkpoint_begins_anew_with_its_pretrained_weights(tmp_path, monkeypatch, restart):
    """Killed before its first checkpoint, or before its folder was made."""
    opt = option_file(tmp_path, steps=1)
    run(opt, "--set", "name=first")
    if restart == "torchrun":
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    else:
        (tmp_path / "out/run").mkdir()
    run(opt, *(["--resume"] if restart == "--resume" else []), "--set",
        f"pretrained={tmp_path / 'out/first/last.pth'}", "learning_rate=1e-30")
    assert "holds no checkpoint yet: the run begins anew" in log(tmp_path)
    first, second = (saved(tmp_path, name)["net"]["patch_embed.weight"] for name in ("first", "run"))
    assert torch.equal(first, second)


def test_pretrained_weights_that_do_not_fit(tmp_path, checkpoint):
    opt = option_file(tmp_path)
    with pytest.raises(InputError, match="nowhere.pth: no such checkpoint"):
        run(opt, "--set", "pretrained=nowhere.pth")
    message = (r"pretrained: .*net.pth: 11 of \d+ tensors do not fit the network "
               r"\(refinement.0.\S*: \[.*\], expected none; [^;]*; [^;]*; \.\.\.\)$")
    with pytest.raises(InputError, match=message):
        run(opt, "--set", f"pretrained={checkpoint}")


def test_a_resumed_table_keeps_its_columns_apart(tmp_path):
    """Columns by name, in the present order; former ones stay, rows without a column have nan there."""
    table = tmp_path / "losses.csv"
    write_csv(table, [["step", "cost_a", "old", "cost_b"], [1, 10, 7, 20], [2, 11, 8, 21], [3, 12, 9, 22]])
    columns = cut_table(table, ("step", "cost_b", "cost_a", "new"), step=2)
    assert columns == ["step", "cost_b", "cost_a", "new", "old"]
    assert [list(row.values()) for row in rows(table)] == [["1", "20", "10", "nan", "7"],
                                                           ["2", "21", "11", "nan", "8"]]


def test_a_run_is_not_overwritten(tmp_path):
    opt = option_file(tmp_path, steps=1)
    run(opt)
    before = (tmp_path / "out/run/last.pth").read_bytes()
    with pytest.raises(InputError, match="holds a run already: continue it with --resume"):
        run(opt)
    assert (tmp_path / "out/run/last.pth").read_bytes() == before
    message = "--resume: no run .*other, expected the name of one that was started"
    with pytest.raises(InputError, match=message):
        run(opt, "--resume", "--set", "name=other")


def test_resume_with_other_options(tmp_path):
    """Batch times processes places a run among its samples; the same product in another way is no change."""
    known = {field.name for field in fields(train.TrainOptions)} | {"samples_per_step"}
    assert {*runs.FIXED, *runs.SAME_RUN} <= known
    opt = option_file(tmp_path, steps=1, validation={"every": 1, **VALIDATED})
    run(opt)
    before, best = (tmp_path / "out/run/last.pth").read_bytes(), state(tmp_path)["best"]
    refused = {
        "ema=0.5": "some.yml, since .*last.pth: ema: 0.9 -> 0.5; a run cannot continue with it",
        "scheme=separate": "scheme: joint -> separate; a run cannot continue with it",
        "sources.1.levels=[4]": r"sources\[1\].levels: \[3.0\] -> \[4.0\]; it would be another run; "
                                "--allow-changes continues nevertheless",
        "sources.1.name=dark": r"sources\[1\].name: lowlight -> dark; it would be another run",
        "objective.gamma=0": "objective.gamma: 0.05 -> 0.0; it would be another run",
        "batch=4": "samples_per_step: 2 -> 4; it would be another run",
    }
    for change, message in refused.items():
        with pytest.raises(InputError, match=message):
            run(opt, "--resume", "--set", change)
    (content := yaml.safe_load(Path(opt).read_text()))["sources"].pop()
    Path(opt).with_name("fewer.yml").write_text(yaml.safe_dump(content))
    for flags, message in ((["--resume"], "last.pth: sources: 2 -> 1; it would be another run"),
                           (["--resume", "--allow-changes"], "last.pth: cannot be resumed from")):
        with pytest.raises(InputError, match=message):
            run(str(Path(opt).with_name("fewer.yml")), *flags)
    assert (tmp_path / "out/run/last.pth").read_bytes() == before
    run(opt, "--resume", "--dry-run")                               # of a run that is done
    changes = ["steps=2", "sources.0.repeat=5", "validation.every=100", "learning_rate=0.5"]
    run(opt, "--resume", "--set", *changes)
    for change in ("sources[0].repeat: 3 -> 5", "steps: 1 -> 2", "samples_per_epoch: [3, 4] -> [5, 4]"):
        assert f"; changed {change}" in log(tmp_path)
    assert state(tmp_path)["best"] == best > 0                      # a worse network is no new best one
    run(opt, "--resume", "--allow-changes", "--set", "steps=3", "seed=1", "sources.0.repeat=5")
    assert "changed seed: 0 -> 1" in log(tmp_path)


def test_resume_with_other_weights_keeps_the_congruence(tmp_path, monkeypatch):
    """Where a resumed run weighs its sources otherwise, the potentials' congruence follows the objective."""
    opt = option_file(tmp_path, steps=1)
    run(opt)
    made, Potentials = [], train.Potentials

    def keep(*arguments, **names) -> Potentials:
        made.append(Potentials(*arguments, **names))
        return made[0]

    monkeypatch.setattr(train, "Potentials", keep)
    run(opt, "--resume", "--allow-changes", "--set", "steps=2", "objective.lambdas=[1,3]")
    f = made[0](torch.randn(4, 8 * 8, 2, 2))
    assert (f * torch.tensor([0.25, 0.75])).sum(dim=1).abs().max() <= 1e-5 and f.abs().max() > 0


def test_resume_takes_the_newest_checkpoint_that_can_be_read(tmp_path):
    """Damaged after it was written, or lost between the renames: the one before; the run ends the same."""
    opt = option_file(tmp_path, steps=4, save_every=1)
    run(opt)
    whole, folder = state(tmp_path), tmp_path / "out/run"
    assert saved(tmp_path, file="previous.pth")["step"] == 3
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:5000]), Path.unlink):
        damage(folder / "last.pth")
        (folder / ".partial-abc.pth").write_bytes(b"a kill in the middle of a write")
        with pytest.raises(InputError, match="holds a run already"):
            run(opt)
        run(opt, "--resume")
        assert same(state(tmp_path), whole) and not list(folder.glob(".partial*"))
        assert saved(tmp_path, file="previous.pth")["step"] == 3    # never replaced by the damaged one
    assert ("last.pth: cannot be read as a checkpoint (BadZipFile), expected a file of train.py; taking"
            in log(tmp_path))
    for name in ("last.pth", "previous.pth"):
        (folder / name).write_bytes((folder / name).read_bytes()[:5000])
    with pytest.raises(InputError, match="previous.pth: cannot be read as a checkpoint"):
        run(opt, "--resume")


def test_resume_from_weights_or_another_run(tmp_path, monkeypatch, checkpoint):
    """From a path: the start of another run; torchrun's restart of that one goes on where it was."""
    opt = option_file(tmp_path, steps=1)
    run(opt)
    message = "net.pth: has no 'train', expected a checkpoint of train.py to resume from"
    with pytest.raises(InputError, match=message):
        run(opt, "--resume", str(checkpoint), "--set", "name=branch")
    path = str(tmp_path / "out/run/last.pth")
    run(opt, "--resume", path, "--set", "steps=2", "name=branch")
    assert saved(tmp_path, "branch")["step"] == 2
    with monkeypatch.context() as patch:
        patch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        run(opt, "--resume", path, "--set", "steps=3", "name=branch")
    assert "branch/last.pth at step 2" in log(tmp_path, "branch")
    content = saved(tmp_path)
    content["train"]["potentials"] = {"g": torch.zeros(3)}
    torch.save(content, tmp_path / "out/run/last.pth")
    message = r"last.pth: cannot be resumed from \(Error\(s\) in loading state_dict for Potentials"
    with pytest.raises(InputError, match=message):
        run(opt, "--resume", "--set", "steps=2")


def test_resume_from_a_path_does_not_touch_another_run(tmp_path):
    """The folder's run stays, and a new name does not carry over the other run's best score."""
    opt = option_file(tmp_path, steps=1, validation={"every": 1, **VALIDATED})
    run(opt, "--set", "name=first")
    run(opt, "--set", "name=second", "seed=1")
    kept = {path.name: path.read_bytes() for path in (tmp_path / "out/second").glob("*.*")}
    first = str(tmp_path / "out/first/last.pth")
    with pytest.raises(InputError, match="second holds a run already: continue it with --resume, or give"):
        run(opt, "--resume", first, "--set", "name=second", "steps=2")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out/second").glob("*.*")} == kept
    run(opt, "--resume", first, "--set", "name=third", "steps=2", "validation.every=100")
    assert saved(tmp_path, "third", "best.pth")["step"] == 2        # whatever the first run's score


def test_a_second_interrupt_ends_at_once(tmp_path, monkeypatch):
    """A Ctrl-C a second after the first does not wait for the step to end and be saved."""
    options = train.load_options(train.TrainOptions, option_file(tmp_path))
    watched = runs.Run(options, None, torch.device("cpu"))
    watched.watch_signals()
    clock = iter([10.0, 10.5, 10.6, 12.0])
    monkeypatch.setattr(runs.time, "monotonic", lambda: next(clock))
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)                              # torchrun's own, after the terminal's
    assert watched.stop_requested(1)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_folder_is_locked_before_anything_is_written(tmp_path, monkeypatch):
    """By another process, which keeps its decoded images; a file system without locks is no obstacle."""
    opt, folder = option_file(tmp_path, cache=True, steps=1), tmp_path / "out/run"
    folder.mkdir(parents=True)
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(); input()"
    other = subprocess.Popen([sys.executable, "-c", code, folder / ".lock"], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(InputError, match="out/run: another process trains there, expected another name"):
        run(opt)
    assert [path.name for path in folder.iterdir()] == [".lock"]
    other.communicate(b"\n")

    def no_locks(*_) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    run(opt)
    assert "cannot be locked ([Errno 37] No locks available): do not train there twice" in log(tmp_path)


@pytest.mark.parametrize("side", ["dual_objective", "potential_objective"])
def test_steps_that_are_not_finite_are_left_out(tmp_path, monkeypatch, side):
    """Step 3 of 6 is not applied, is counted and is no part of the means; the others go on."""
    calls, objective = [], getattr(train, side)

    def third_is_nan(*arguments):
        calls.append(None)
        result = objective(*arguments)
        return result * torch.nan if len(calls) == 3 else result

    monkeypatch.setattr(train, side, third_is_nan)
    run(option_file(tmp_path, log_every=3))
    content = saved(tmp_path)
    assert content["step"] == 6 and all(t.isfinite().all() for t in content["train"]["net"].values())
    table = rows(tmp_path / "out/run/losses.csv")
    assert [row["skipped"] for row in table] == ["1", "0"]
    means = [float(table[0][name]) for name in ("map_loss", "potential_loss", "gradient_norm")]
    assert all(mean == mean for mean in means)
    map_loss, error, dual = (float(table[1][name]) for name in ("map_loss", "reconstruction", "dual"))
    assert map_loss == pytest.approx(1e4 * error + dual, rel=1e-4)              # w_rec of the paper
    assert "step 3: 1 not applied since the last reading, loss or gradient not finite" in log(tmp_path)


def test_a_series_of_steps_that_are_not_finite_ends_the_run(tmp_path, monkeypatch):
    calls, dual_objective = [], train.dual_objective

    def nan_from_the_third(*arguments):
        calls.append(None)
        loss = dual_objective(*arguments)
        return loss * torch.nan if len(calls) >= 3 else loss

    monkeypatch.setattr(train, "dual_objective", nan_from_the_third)
    monkeypatch.setattr(runs, "NOT_APPLIED", 3)
    message = ("step 5: loss or gradient not finite, 3 steps in a row; "
               "the last good checkpoint is .*last.pth")
    with pytest.raises(InputError, match=message):
        run(option_file(tmp_path, steps=8, save_every=2, log_every=5))
    assert saved(tmp_path)["step"] == 4
    first, last = saved(tmp_path, file="previous.pth")["train"], state(tmp_path)
    assert all(t.isfinite().all() for t in last["net"].values()) and same(first["net"], last["net"])
    assert same(first["map_optimizer"]["state"], last["map_optimizer"]["state"])


def test_a_full_disk_ends_the_run_in_one_line(tmp_path):
    """A file may have 1 MB: the checkpoint has more. With room again, the run goes on."""
    opt, limits = option_file(tmp_path, steps=3, save_every=2), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large: '.*/out/run/last.pth'"):
            run(opt)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    folder = tmp_path / "out/run"
    assert not list(folder.glob("*.pth")) and not list(folder.glob(".partial*"))
    run(opt, "--resume")
    run(opt, "--set", "name=whole")
    assert same(state(tmp_path)["net"], state(tmp_path, "whole")["net"])


@pytest.mark.parametrize("killed", [True, False])
def test_what_ends_a_worker_is_named(tmp_path, public_tree, monkeypatch, killed):
    low = write_image(public_tree / "Train/lowlight/low/2.png", 200, 200)
    low.write_bytes(low.read_bytes()[:20000])
    message = r"low/2.png: cannot be read as an image \(.*\)"
    if killed:
        monkeypatch.setattr(data.datasets, "read_image", lambda path: os.kill(os.getpid(), signal.SIGKILL))
        message = r"a worker died \((killed by signal: Killed|exited unexpectedly)\) while it read an image, "
    source = {"name": "lowlight", "degraded": "Train/lowlight/low", "clean": "Train/lowlight/high"}
    with pytest.raises(InputError, match=message):
        run(option_file(tmp_path, root=str(public_tree), sources=[source], workers=1))


def test_two_processes_train_as_one_and_end_together(tmp_path):
    """As torchrun starts them, on gloo with batch 1 each: samples and losses of one process with batch 2.

    When one dies, the other ends, too; --resume goes on, here in one process.
    """
    opt = option_file(tmp_path, steps=3, optimizer="rmsprop", learning_rate=1e-5, ema=0, schedule="constant",
                      save_every=3)
    run(opt, "--set", "name=one")
    with socket.create_server(("localhost", 0)) as server:
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(server.getsockname()[1])}
    pair = [start(tmp_path, opt, "--set", "name=two", "batch=1", "steps=100000", WORLD_SIZE="2",
                  RANK=str(rank), LOCAL_RANK=str(rank), **address) for rank in (0, 1)]
    wait_for(tmp_path / "out/two/last.pth", pair[0])
    pair[1].kill()
    pair[0].join(60)
    errors = (tmp_path / "output.txt").read_text()
    assert pair[0].exitcode == 1 and re.search("error: process 0: another process ended", errors), errors
    one, two = (rows(tmp_path / "out" / name / "losses.csv")[:3] for name in ("one", "two"))
    for first, second in zip(one, two, strict=True):
        for term in ("map_loss", "reconstruction", "distance", "contrastive", "orthogonality", "potential",
                     "gradient_norm", "potential_loss", "potential_gradient_norm"):
            expected = pytest.approx(float(second[term]), rel=2e-4, abs=1e-5)
            assert float(first[term]) == expected, (first["step"], term)
    step = saved(tmp_path, "two")["step"]
    run(opt, "--resume", "--set", "name=two", "batch=2", f"steps={step + 1}")
    assert saved(tmp_path, "two")["step"] == step + 1


def test_penalty_and_other_options_run(tmp_path):
    run(option_file(tmp_path, steps=2, optimizer="rmsprop", precision="bfloat16", ema=0.0, clip=1.0,
                    progressive=[[1, 1, 24]], schedule=0.1, warmup=0,
                    objective={"lambdas": "uniform", "penalty": 10}))
    (first, second) = rows(tmp_path / "out/run/losses.csv")
    assert float(first["learning_rate"]) == 1e-3 and float(second["learning_rate"]) < 1e-3
    assert all(float(row[term]) == float(row[term]) for row in (first, second) for term in runs.TERMS
               if term != "transport_gradient_norm")


@pytest.mark.parametrize("change, message", [
    ("network.heads=[1,2,4]", r"some.yml: network: heads: 3 values, expected 4"),
    ("objective.lambdas=[1,2,3]", r"some.yml: objective.lambdas: \[1.0, 2.0, 3.0\], expected inverse"),
])
def test_what_the_networks_refuse_is_named(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        run(option_file(tmp_path), "--dry-run", "--set", change)


def test_the_average_of_weights_forgets_the_first():
    averaged, average, expected = [torch.zeros(1)], train.growing_average(0.9), 0.0
    for step in range(1, 120):
        average(averaged, [torch.full((1,), float(step))], torch.tensor(step))
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert averaged[0].item() == pytest.approx(expected, rel=1e-5) and expected > 105
