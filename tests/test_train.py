"""train.py end to end: the two phases, interruption and resume, errors, several processes."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import train
from benchmarks.faults import same_state as same
from conftest import REPOSITORY, TINY_NETWORK, run_script, write_image
from utils import runs
from utils.errors import InputError
from utils.files import cut_table, write_csv


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


OPTIONS = {
    "name": "run", "device": "cpu", "steps": 6, "batch": 2, "patch": 16, "workers": 0, "log_every": 1,
    "save_every": 100, "optimizer": "adamw", "learning_rate": 1e-3, "ema": 0.9,
    "schedule": {"name": "cosine", "warmup": 2},
    "sources": [
        {"name": "noise", "bundled": ["coffee.png"], "degradation": "noise", "levels": [15, 50],
         "repeat": 3},
        {"name": "lowlight", "bundled": ["coffee.png"], "degradation": "lowlight", "levels": [3],
         "repeat": 4},
    ],
}


def option_file(tmp_path: Path, **changes) -> str:
    path = tmp_path / "some.yml"
    path.write_text(yaml.safe_dump({**OPTIONS, "output": str(tmp_path / "out"), **changes}))
    return str(path)


def run(opt: str, *arguments: str) -> None:
    train.main(["--opt", opt, *arguments, "--set", *TINY_NETWORK])


def command(opt: str, *arguments: str) -> list[str]:
    return [sys.executable, "train.py", "--opt", opt, *arguments, "--set", *TINY_NETWORK]


def shell(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, text=True,
                          env={**os.environ, **environment}, timeout=300)


def start(arguments: list[str], **how) -> subprocess.Popen:
    return subprocess.Popen(arguments, cwd=REPOSITORY, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                            text=True, **how)


def state(tmp_path: Path, name: str = "run") -> dict:
    return torch.load(tmp_path / "out" / name / "last.pth", weights_only=True)["train"]


def rows(path: Path) -> list[dict]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_each_phase_moves_only_its_own_parameters(tmp_path, monkeypatch):
    """A run of one step without its potential step, and with it: the potentials alone differ."""
    opt = option_file(tmp_path, steps=1, schedule={"name": "constant"})
    with monkeypatch.context() as patch:
        patch.setattr(train, "potential_step", lambda *_: {})
        run(opt, "--set", "name=map_only")
    run(opt, "--set", "name=both")
    map_only, both = state(tmp_path, "map_only"), state(tmp_path, "both")
    torch.manual_seed(0)
    network = torch.load(tmp_path / "out/both/last.pth", weights_only=True)["network"]
    initial_net = train.BaryIR(**network).state_dict()
    moved = [name for name in initial_net if not torch.equal(initial_net[name], both["net"][name])]
    assert len(moved) > 0.95 * len(initial_net)                     # the first step moves (nearly) everything
    assert same(map_only["net"], both["net"])                       # the potential step moved none of it
    assert map_only["potential_optimizer"]["state"] == {}           # the map step moved no potential
    before, after = map_only["potentials"], both["potentials"]
    assert {name for name in after if not torch.equal(before[name], after[name])} == set(after)


def test_scheme_separate_moves_each_side_by_its_own_objective(tmp_path):
    """T and potentials do not see the targets, encoder and decoder not the potentials."""
    opt = option_file(tmp_path, steps=1, scheme="separate", map_steps=3, objective={"cost": "mean_square"},
                      schedule={"name": "constant"}, ema=0)
    runs = {"first": [], "other_potentials": ["potential_learning_rate=0.1", "map_steps=1"],
            "other_rate": ["learning_rate=0.01"]}
    for name, changes in runs.items():
        run(opt, "--set", f"name={name}", *changes)
    first, other_potentials, other_rate = (state(tmp_path, name) for name in runs)
    torch.manual_seed(0)
    network = torch.load(tmp_path / "out/first/last.pth", weights_only=True)["network"]
    initial, net = train.BaryIR(**network).state_dict(), first["net"]
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
    opt = option_file(tmp_path, steps=6, scheme="separate", map_steps=2, objective={"cost": "mean_square"},
                      balanced=True, clean_share=0.2, save_every=4)
    run(opt)
    whole, folder = state(tmp_path), tmp_path / "out/run"
    (folder / "previous.pth").rename(folder / "last.pth")          # of step 4
    run(opt, "--resume")
    assert same(state(tmp_path), whole)
    with pytest.raises(InputError, match="scheme: separate -> joint, .* a run cannot continue with it"):
        run(opt, "--resume", "--set", "scheme=joint", "map_steps=1")


@pytest.mark.parametrize("changes, message", [
    (["pretrained=nowhere.pth"], "nowhere.pth: no such checkpoint"),
    (["objective.w_rec=0"], "objective.w_rec: 0.0, expected a number above 0"),
    (["balanced=true", "batch=3"], r"balanced: batches of \[3\] with 2 sources, expected multiples of 2"),
])
def test_runs_that_cannot_be(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        run(option_file(tmp_path), "--set", *changes)


@pytest.mark.parametrize("restart", ["--resume", "torchrun"])
def test_a_run_that_begins_anew_has_its_pretrained_weights(tmp_path, monkeypatch, restart):
    """Killed before its first checkpoint, or before its folder was made."""
    opt = option_file(tmp_path, steps=1)
    run(opt, "--set", "name=first")
    first = torch.load(tmp_path / "out/first/last.pth", weights_only=True)["net"]
    if restart == "torchrun":
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    else:
        (tmp_path / "out/run").mkdir()
    run(opt, *(["--resume"] if restart == "--resume" else []), "--set",
        f"pretrained={tmp_path / 'out/first/last.pth'}", "learning_rate=1e-30")
    assert "begins anew" in (tmp_path / "out/run/train.log").read_text()
    second = torch.load(tmp_path / "out/run/last.pth", weights_only=True)["net"]
    assert torch.equal(first["patch_embed.weight"], second["patch_embed.weight"])


def test_a_resumed_table_keeps_its_columns_apart(tmp_path):
    """Columns by name, in the present order; former ones stay, rows without a column have nan there."""
    table = tmp_path / "losses.csv"
    write_csv(table, [["step", "cost_a", "old", "cost_b"], [1, 10, 7, 20], [2, 11, 8, 21], [3, 12, 9, 22]])
    columns = cut_table(table, ("step", "cost_b", "cost_a", "new"), step=2)
    assert columns == ["step", "cost_b", "cost_a", "new", "old"]
    assert [list(row.values()) for row in rows(table)] == [["1", "20", "10", "nan", "7"],
                                                           ["2", "21", "11", "nan", "8"]]


def test_resume_changes_that_are_refused_or_kept(tmp_path):
    opt = option_file(tmp_path, steps=2, validation={"every": 2, "sets": [
        {"name": "noise_25", "bundled": ["chessboard_RGB.png"], "degradation": "noise", "levels": [25]}]})
    run(opt)
    run(opt, "--resume", "--dry-run")                               # of a run that is done
    best = state(tmp_path)["best"]
    with pytest.raises(InputError, match="scheme: .* a run cannot continue with it"):
        run(opt, "--resume", "--allow-changes", "--set", "scheme=separate")
    run(opt, "--resume", "--set", "validation.every=100", "learning_rate=0.5", "steps=3")
    assert state(tmp_path)["best"] == best > 0                      # a worse network is no new best one


def test_pretrained_weights_of_another_network(tmp_path, checkpoint):
    with pytest.raises(InputError, match="pretrained: .*net.pth has another network than the option file"):
        run(option_file(tmp_path, pretrained=str(checkpoint)), "--set", "network.width=16")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_run_resumes_bit_by_bit(tmp_path, monkeypatch, number):
    """A signal in the middle of an epoch, then --resume, equals the run that was left alone."""
    opt = option_file(tmp_path, steps=12, save_every=4, validation={"every": 6, "sets": [
        {"name": "noise_25", "bundled": ["chessboard_RGB.png"], "degradation": "noise", "levels": [25]}]})
    run(opt, "--set", "name=whole")

    table, append_row = tmp_path / "out/run/losses.csv", runs.append_row

    def interrupt(path: Path, row: tuple) -> None:
        append_row(path, row)
        if path == table and row[0] == 5:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "append_row", interrupt)
        message = f"stopped by {number.name} at step 5 of 12: saved, continue with --resume"
        with pytest.raises(InputError, match=message) as stopped:
            run(opt)
    assert stopped.value.status == 128 + number
    assert torch.load(tmp_path / "out/run/last.pth", weights_only=True)["step"] == 5
    append_row(table, (6, *["0"] * 10))                             # as if killed later, after more logging

    torch.rand(7)                                                   # a new process has another random state
    run(opt, "--resume")
    whole, resumed = state(tmp_path, "whole"), state(tmp_path)
    assert [key for key in whole if not same(whole[key], resumed[key])] == ["options"]      # their names
    for name, columns in (("losses.csv", runs.TERMS), ("validation.csv", ("step", "set", "psnr"))):
        ours, theirs = (rows(tmp_path / "out" / folder / name) for folder in ("run", "whole"))
        if name == "losses.csv":                                    # means over log_every steps, 1 here
            assert [row["step"] for row in ours] == [str(step) for step in range(1, 13)]
        assert [[row[c] for c in columns] for row in ours] == [[row[c] for c in columns] for row in theirs]
    assert (tmp_path / "out/run/best.pth").exists()


def test_signal_to_the_process_group_saves_though_workers_load(tmp_path):
    """Ctrl-C in a terminal and torchrun's SIGTERM go to the workers, too: none dies before the checkpoint."""
    opt = option_file(tmp_path, steps=100_000, workers=1)
    process = start(command(opt), start_new_session=True)
    table = tmp_path / "out/run/losses.csv"
    while process.poll() is None and not (table.exists() and len(table.read_text().splitlines()) > 3):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in errors, errors
    message = r"error: stopped by SIGTERM at step \d+ of 100000: saved, continue with --resume\n$"
    assert re.search(message, errors)
    assert torch.load(tmp_path / "out/run/last.pth", weights_only=True)["step"] >= 3


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
    opt = option_file(tmp_path, steps=1)
    run(opt)
    before = (tmp_path / "out/run/last.pth").read_bytes()
    refused = {
        "ema=0.5": "ema: 0.9 -> 0.5, since .*last.pth; a run cannot continue with it",
        "potentials.congruence=penalty":
            "potentials.congruence: exact -> penalty, since .*; a run cannot continue with it",
        "sources.1.levels=[4]": r"sources\[1\].levels\[0\]: 3.0 -> 4.0, .*; it would be another run; "
                                "--allow-changes continues nevertheless",
        "sources.1.name=dark": r"sources\[1\].name: lowlight -> dark, .*; it would be another run",
        "seed=1": "seed: 0 -> 1, .*another run",
        "objective.gamma=0": "objective.gamma: 0.05 -> 0.0, .*another run",
    }
    for change, message in refused.items():
        with pytest.raises(InputError, match=message):
            run(opt, "--resume", "--set", change)
    (content := yaml.safe_load(Path(opt).read_text()))["sources"].pop()
    Path(opt).with_name("fewer.yml").write_text(yaml.safe_dump(content))
    message = "sources: 1, but .*last.pth was trained on 2; a run cannot continue with them"
    with pytest.raises(InputError, match=message):
        run(str(Path(opt).with_name("fewer.yml")), "--resume", "--allow-changes")
    assert (tmp_path / "out/run/last.pth").read_bytes() == before
    run(opt, "--resume", "--set", "steps=2", "sources.0.repeat=5")
    log = (tmp_path / "out/run/train.log").read_text()
    assert ("at step 1; changed sources[0].repeat: 3 -> 5; changed steps: 1 -> 2; "
            "changed samples_per_epoch[0]: 3 -> 5") in log
    run(opt, "--resume", "--allow-changes", "--set", "steps=3", "seed=1", "sources.0.repeat=5")
    assert "changed seed: 0 -> 1" in (tmp_path / "out/run/train.log").read_text()


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
    f = made[0](torch.randn(4, made[0].features[0].in_channels, 2, 2))
    assert (f * torch.tensor([0.25, 0.75])).sum(dim=1).abs().max() <= 1e-5 and f.abs().max() > 0


def test_resume_takes_the_newest_checkpoint_that_can_be_read(tmp_path):
    """Damaged after it was written, or lost between the renames: the one before; the run ends the same."""
    opt = option_file(tmp_path, steps=4, save_every=1)
    run(opt)
    whole = state(tmp_path)
    folder = tmp_path / "out/run"
    assert torch.load(folder / "previous.pth", weights_only=True)["step"] == 3
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:5000]), Path.unlink):
        damage(folder / "last.pth")
        (folder / ".partial-abc.pth").write_bytes(b"a kill in the middle of a write")
        with pytest.raises(InputError, match="holds a run already"):
            run(opt)
        run(opt, "--resume")
        assert same(state(tmp_path), whole) and not list(folder.glob(".partial*"))
        previous = torch.load(folder / "previous.pth", weights_only=True)
        assert previous["step"] == 3                                # never replaced by the damaged one
    assert ("last.pth: cannot be read as a checkpoint (BadZipFile), expected a file of train.py; taking"
            in (folder / "train.log").read_text())
    for name in ("last.pth", "previous.pth"):
        (folder / name).write_bytes((folder / name).read_bytes()[:5000])
    with pytest.raises(InputError, match="previous.pth: cannot be read as a checkpoint"):
        run(opt, "--resume")


def test_resume_from_weights_or_another_run(tmp_path, checkpoint):
    opt = option_file(tmp_path, steps=1)
    run(opt)
    message = "net.pth: has no 'train', expected a checkpoint of train.py to resume from"
    with pytest.raises(InputError, match=message):
        run(opt, "--resume", str(checkpoint), "--set", "name=branch")
    path = str(tmp_path / "out/run/last.pth")                       # from a path: the start of another run
    run(opt, "--resume", path, "--set", "steps=2", "name=branch")
    assert torch.load(tmp_path / "out/branch/last.pth", weights_only=True)["step"] == 2
    content = torch.load(tmp_path / "out/run/last.pth", weights_only=True)
    content["train"]["potentials"] = {"g": torch.zeros(3)}
    torch.save(content, tmp_path / "out/run/last.pth")
    message = r"last.pth: cannot be resumed from \(Error\(s\) in loading state_dict for Potentials"
    with pytest.raises(InputError, match=message):
        run(opt, "--resume", "--set", "steps=2")


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    opt = option_file(tmp_path, steps=2)
    run(opt, "--set", "name=whole")
    (tmp_path / "out/run").mkdir()
    run(opt, "--resume")
    assert same(state(tmp_path, "whole")["net"], state(tmp_path)["net"])
    assert "holds no checkpoint yet: the run begins anew" in (tmp_path / "out/run/train.log").read_text()


def test_resume_from_a_path_does_not_touch_another_run(tmp_path):
    """REVIEW 2, 6: the folder's run stays, and a new name does not carry over the other run's best score."""
    sets = [{"name": "noise_25", "bundled": ["chessboard_RGB.png"], "degradation": "noise", "levels": [25]}]
    opt = option_file(tmp_path, steps=1, validation={"every": 1, "sets": sets})
    run(opt, "--set", "name=first")
    run(opt, "--set", "name=second", "seed=1")
    kept = {path.name: path.read_bytes() for path in (tmp_path / "out/second").glob("*.*")}
    message = "second holds a run already: continue it with --resume, or give this one another name"
    first = str(tmp_path / "out/first/last.pth")
    with pytest.raises(InputError, match=message):
        run(opt, "--resume", first, "--set", "name=second", "steps=2")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out/second").glob("*.*")} == kept
    run(opt, "--resume", first, "--set", "name=third", "steps=2", "validation.every=100")
    assert (tmp_path / "out/third/best.pth").exists()               # its own, whatever the first run's score
    assert torch.load(tmp_path / "out/third/best.pth", weights_only=True)["step"] == 2


def test_a_torchrun_restart_goes_on_from_the_newest_checkpoint(tmp_path, monkeypatch):
    """REVIEW 3: of a run that was started by --resume PATH."""
    opt = option_file(tmp_path, steps=1)
    run(opt, "--set", "name=first")
    path = str(tmp_path / "out/first/last.pth")
    run(opt, "--resume", path, "--set", "name=second", "steps=3")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run(opt, "--resume", path, "--set", "name=second", "steps=4")
    assert "second/last.pth at step 3" in (tmp_path / "out/second/train.log").read_text()


def test_a_second_interrupt_ends_at_once(tmp_path, monkeypatch):
    """REVIEW 7: a Ctrl-C a second after the first does not wait for the step to end and be saved."""
    watched = runs.Run(train.load_options(train.TrainOptions, option_file(tmp_path)), None)
    watched.watch_signals()
    clock = iter([10.0, 10.5, 10.6, 12.0])
    monkeypatch.setattr(runs.time, "monotonic", lambda: next(clock))
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)                              # torchrun's own, after the terminal's
    assert watched.stopping(1, torch.device("cpu"))
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_run_is_locked_before_anything_is_written(tmp_path, monkeypatch):
    """REVIEW 7: another process that trains there keeps its decoded images."""
    opt = option_file(tmp_path, cache=True, steps=1)

    def taken(folder: Path) -> None:
        raise InputError("taken")

    monkeypatch.setattr(runs, "lock", taken)
    with pytest.raises(InputError, match="taken"):
        run(opt)
    assert not list((tmp_path / "out/run").iterdir())


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
    checkpoint = torch.load(tmp_path / "out/run/last.pth", weights_only=True)
    assert checkpoint["step"] == 6 and all(t.isfinite().all() for t in checkpoint["train"]["net"].values())
    table = rows(tmp_path / "out/run/losses.csv")
    assert [row["skipped"] for row in table] == ["1", "0"]
    means = [float(table[0][name]) for name in ("map_loss", "potential_loss", "gradient_norm")]
    assert all(mean == mean for mean in means)
    map_loss, error, dual = (float(table[1][name]) for name in ("map_loss", "reconstruction", "dual"))
    assert map_loss == pytest.approx(1e4 * error + dual, rel=1e-4)              # w_rec of the paper
    assert ("step 3: 1 not applied since the last reading, loss or gradient not finite: 3"
            in (tmp_path / "out/run/train.log").read_text())


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
    checkpoint = torch.load(tmp_path / "out/run/last.pth", weights_only=True)
    last = checkpoint["train"]
    assert checkpoint["step"] == 4 and all(t.isfinite().all() for t in last["net"].values())
    first = torch.load(tmp_path / "out/run/previous.pth", weights_only=True)["train"]
    assert same(first["net"], last["net"])
    assert same(first["map_optimizer"]["state"], last["map_optimizer"]["state"])


def test_a_full_disk_ends_the_run_in_one_line(tmp_path):
    """A file may have 2 MB: the checkpoint has more."""
    opt = option_file(tmp_path, steps=3, save_every=2)
    limited = ["bash", "-c", 'ulimit -f 2000; exec "$@"', "bash"]
    result = shell(*limited, *command(opt))
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert re.search("error: .*last.pth: .*(large|written)", result.stderr.splitlines()[-1])
    folder = tmp_path / "out/run"
    assert not list(folder.glob("*.pth")) and not list(folder.glob(".partial*"))
    assert shell(*command(opt, "--resume")).returncode == 0     # with room again
    shell(*command(opt, "--set", "name=whole"))
    assert same(state(tmp_path)["net"], state(tmp_path, "whole")["net"])


def test_one_process_to_a_folder(tmp_path):
    opt, losses = option_file(tmp_path, steps=100_000, log_every=1), tmp_path / "out/run/losses.csv"
    process = start(command(opt))
    while process.poll() is None and not (losses.exists() and len(losses.read_text().splitlines()) > 1):
        time.sleep(0.1)
    with pytest.raises(InputError, match="out/run: another process trains there, expected another name"):
        run(opt, "--resume")
    process.send_signal(signal.SIGINT)
    assert "stopped by SIGINT" in process.communicate(timeout=60)[1]


def test_a_worker_that_dies_is_reported(tmp_path, public_tree):
    opt = option_file(tmp_path, root=str(public_tree), sources=[{"type": "lowlight"}], workers=1, steps=1000)
    dies = ("import os, signal, sys; import data.datasets as d; read = d.read_image\n"
            "def die(path):\n    os.kill(os.getpid(), signal.SIGKILL) if 'high' in str(path) else None\n"
            "    return read(path)\n"
            "d.read_image = die; import train; from utils.errors import one_line_errors\n"
            "with one_line_errors():\n    train.main(sys.argv[1:])")
    result = shell(sys.executable, "-c", dies, *command(opt)[2:])
    assert result.returncode == 1 and "Traceback" not in result.stderr
    message = (r"error: a worker died \((killed by signal: Killed|exited unexpectedly)\) "
               "while it read an image, expected")
    assert re.search(message, result.stderr.splitlines()[-1])


def test_the_death_of_one_process_ends_all(tmp_path):
    """Under torchrun; a restart resumes."""
    opt = option_file(tmp_path, steps=100_000, batch=1, save_every=2)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = start([*torchrun, *command(opt)[1:]], env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and not (tmp_path / "out/run/last.pth").exists():
        time.sleep(0.1)
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    children, began = [int(pid) for pid in listed.split()], time.monotonic()
    os.kill(children[1], signal.SIGKILL)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode != 0 and time.monotonic() - began < 60
    assert re.search(r"error: (process 0: another process ended|stopped by SIGTERM)", errors), errors
    step = torch.load(tmp_path / "out/run/last.pth", weights_only=True)["step"]
    again = command(opt, "--resume", "--set", f"steps={step + 1}")
    result = shell(*torchrun, *again[1:], OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    assert torch.load(tmp_path / "out/run/last.pth", weights_only=True)["step"] == step + 1


def test_penalty_and_other_options_run(tmp_path):
    run(option_file(tmp_path, steps=2, optimizer="rmsprop", precision="bfloat16", ema=0.0, clip=1.0,
                    progressive=[[1, 1, 24]], schedule={"name": "step", "every": 0.1},
                    potentials={"congruence": "penalty"}, objective={"lambdas": "uniform"}))
    (first, second) = rows(tmp_path / "out/run/losses.csv")
    assert float(first["learning_rate"]) == 1e-3 and float(second["learning_rate"]) < 1e-3
    assert all(float(row[term]) == float(row[term]) for row in (first, second) for term in runs.TERMS
               if term != "transport_gradient_norm")


def test_two_processes_train_as_one(tmp_path):
    """torchrun on gloo with batch 1 each, against one process with batch 2: the same samples and losses."""
    opt = option_file(tmp_path, steps=3, optimizer="rmsprop", learning_rate=1e-5, ema=0.0)
    run(opt, "--set", "name=one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = shell(*torchrun, *command(opt, "--set", "name=two", "batch=1")[1:], OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    tables = (rows(tmp_path / "out" / name / "losses.csv") for name in ("one", "two"))
    for one, two in zip(*tables, strict=True):
        for term in ("map_loss", "reconstruction", "distance", "contrastive", "orthogonality", "potential",
                     "gradient_norm", "potential_loss", "potential_gradient_norm"):
            expected = pytest.approx(float(two[term]), rel=2e-4, abs=1e-5)
            assert float(one[term]) == expected, (one["step"], term)


# --dry-run on the public layout, and what it refuses.

def dry_run(root: Path, *changes: str) -> subprocess.CompletedProcess:
    return run_script("train.py", "--opt", "options/train_5d.yml", "--dry-run", "--set", f"root={root}",
                      "device=cpu", f"output={root.parent / 'out'}", *TINY_NETWORK, "patch=16", *changes)


def test_dry_run_lists_every_source(public_tree):
    result = dry_run(public_tree)
    assert result.returncode == 0, result.stderr
    for line in ("source denoise: 3 clean images in", "source derain: 3 pairs", "source dehaze: 4 pairs",
                 "source deblur: 2 pairs", "source lowlight: 1 pairs", "x 360 = 1080 samples an epoch",
                 "validation SOTS: 1 pairs", "one step: map_loss", "w_rec: 10000.0"):
        assert line in result.stdout, line
    assert re.search(r"network [\d,]+ parameters, potentials [\d,]+", result.stdout)
    assert not (public_tree.parent / "out").exists()                # a dry run writes nothing


def test_a_run_goes_without_an_optional_validation_set(tmp_path):
    """REVIEW 1: train_single.yml has one, for those who have test pairs."""
    for side in ("degraded", "target"):
        write_image(tmp_path / f"Train/single/{side}/a.png")
    changes = [f"root={tmp_path}", f"output={tmp_path / 'out'}", "device=cpu", "steps=1", "batch=1",
               "patch=16", "workers=0", "precision=float32", *TINY_NETWORK]
    result = run_script("train.py", "--opt", "options/train_single.yml", "--set", *changes)
    assert result.returncode == 0, result.stderr
    assert "left out (optional)" in result.stdout and (tmp_path / "out/baryir_single/last.pth").exists()


def missing_folder(root: Path) -> None:
    (root / "Train/Deblur/sharp").rename(root / "Train/Deblur/sharper")


def unpaired_file(root: Path) -> None:
    (root / "Train/Derain/gt/norain-2.png").unlink()


def truncated_image(root: Path) -> None:
    path = write_image(root / "Train/lowlight/low/2.png", 200, 200)
    path.write_bytes(path.read_bytes()[:20000])


def unequal_sizes(root: Path) -> None:
    write_image(root / "Train/Deblur/sharp/GOPR0372_07_00-000048.png", 41, 32)


@pytest.mark.parametrize("damage, changes, message", [
    (missing_folder, [], r"options/train_5d.yml: sources\[3\].clean: no folder .*/Train/Deblur/sharp"),
    (unpaired_file, [], r"sources\[1\]: 1 of 3 degraded images have no clean partner: "
                        r".*rain-2.png \(expected .*norain-2"),
    (truncated_image, [], r"Train/lowlight/low/2.png: cannot be read as an image"),
    (unequal_sizes, [], r".*blur/GOPR0372_07_00-000048.png is 40x32 but "
                        r".*sharp/GOPR0372_07_00-000048.png is 41x32, expected the same size"),
    (None, ["learning_rte=1"],
     r"options/train_5d.yml: learning_rte: unknown option, did you mean learning_rate\?"),
    (None, ["batch=three"], r"options/train_5d.yml: batch: 'three', expected a whole number"),
    (None, ["network.heads=[1,2,4]"], r"options/train_5d.yml: network: heads: 3 values, expected 4"),
    (None, ["objective.lambdas=[1,2]"],
     r"options/train_5d.yml: objective.lambdas: \[1.0, 2.0\], expected inverse, uniform or 5 positive"),
])
def test_dry_run_refuses_in_one_line(public_tree, damage, changes, message):
    if damage:
        damage(public_tree)
    result = dry_run(public_tree, *changes)
    assert result.returncode == 1
    errors = [line for line in result.stderr.replace("\r", "\n").splitlines()
              if line.strip() and "decoding" not in line]
    assert len(errors) == 1 and re.match("error: .*" + message, errors[0]), result.stderr


def test_truncated_image_in_a_worker_is_one_line(tmp_path, public_tree):
    truncated_image(public_tree)
    opt = option_file(tmp_path, root=str(public_tree), sources=[{"type": "lowlight"}], workers=1)
    result = shell(*command(opt))
    assert result.returncode == 1
    message = r"error: .*Train/lowlight/low/2.png: cannot be read as an image \(.*\)"
    assert re.fullmatch(message, result.stderr.strip().splitlines()[-1])
    assert "Traceback" not in result.stderr
