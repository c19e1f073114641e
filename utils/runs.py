"""A training run's folder: its lock, log, tables and checkpoints, and the signals that end it."""

import dataclasses
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils import distributed
from utils.checkpoint import newest_checkpoint, save_checkpoint
from utils.errors import InputError, naming, one_line
from utils.evaluation import Row, average_row, scores_of
from utils.files import append_row, append_text, cut_table, remove_partial, write_text
from utils.options import TrainOptions, dump
from utils.sides import Side

TERMS = ("map_loss", "reconstruction", "dual", "cost", "distance", "contrastive", "orthogonality",
         "potential", "gradient_norm", "transport_gradient_norm", "potential_loss", "congruence_error",
         "potential_gradient_norm")                             # columns of losses.csv
VALIDATION = ("step", "set", "images", "psnr_in", "ssim_in", "psnr", "ssim")    # columns of validation.csv
# Options that a run must keep: with others it would be another run, or its state would not fit.
FIXED = ("network", "optimizer", "ema", "scheme", "sources", "seed", "objective", "balanced", "clean_share",
         "camera_share", "progressive", "samples_per_step")
NOT_APPLIED = 10            # so many steps in a row whose loss or gradient is not finite end a run
AGREE_EVERY = 5             # steps between GPU processes' exchanges of signals: torchrun kills after 30 s


class Run:
    """A run's folder `output/name`, locked for as long as the process lives.

    It holds options.yml, train.log, losses.csv, validation.csv, last.pth, previous.pth (the one before,
    should the last be damaged) and best.pth. Of several processes the first one writes; in a dry run none.
    resume: go on from the folder's newest checkpoint that can be read.

    InputError where the folder holds another run, is in use, or is not there to resume from.
    """

    def __init__(self, options: TrainOptions, resume: bool, device: torch.device, dry: bool = False) -> None:
        self.options, self.device, self.folder = options, device, Path(options.output) / options.name
        self.dry, self.writes = dry, distributed.rank() == 0 and not dry
        self.step, self.best, self.checkpoint, self.signals = 0, -math.inf, None, []
        checkpoints = self.folder / "last.pth", self.folder / "previous.pth"
        if not dry and not resume and any(map(Path.exists, checkpoints)):
            raise InputError(f"{self.folder} holds a run already: continue it with --resume, "
                             "or give this one another name")
        if resume and not self.folder.exists():
            raise InputError(f"--resume: no run {self.folder}, expected the name of one that was started")
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock(self.folder, self.log)
            remove_partial(self.folder)
        if resume:
            self.checkpoint = newest_checkpoint(self.folder, self.log)
            if not self.checkpoint:
                self.log(f"{self.folder} holds no checkpoint yet: the run begins anew")

    def log(self, message: str) -> None:
        """Print a message, and add it to train.log."""
        if distributed.rank() == 0:
            tqdm.write(message)
        if self.writes:
            append_text(self.folder / "train.log", f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")

    def resume(self, state: Mapping, sampling: dict) -> int:
        """Put networks and optimizers into the checkpoint's state, if any, and the tables back to its step.

        state: by name, what has a state_dict and is needed to go on exactly; None for what the run lacks.
        sampling: samples_per_step of all processes and samples_per_epoch of the sources.
        Returns the step at which the run goes on. InputError where the checkpoint is of another run.
        """
        self.state, self.described = state, {**dataclasses.asdict(self.options), **sampling}
        if self.checkpoint:
            self._load(*self.checkpoint)
            self.checkpoint = None                              # frees its memory
        if self.writes:
            write_text(self.folder / "options.yml", dump(self.options))
            cut_table(self.folder / "validation.csv", VALIDATION, self.step)
        return 0 if self.dry else self.step

    def _load(self, path: Path, content: dict) -> None:
        if "train" not in content:
            raise InputError(f"{path}: has no 'train', expected a checkpoint of train.py to resume from, "
                             "not weights only")
        self.step, saved = content["step"], content["train"]
        with naming(f"{self.options.file}, since {path}"):
            changed = dict(changes(saved["options"], self.described))
            for name, text in changed.items():
                if re.split(r"[.[]", name)[0] in FIXED:
                    raise InputError(f"{text}; it would be another run: start one, with pretrained: FILE")
        try:
            for name, part in self.state.items():
                if part:
                    part.load_state_dict(saved[name])
        except (KeyError, ValueError, RuntimeError) as error:
            raise InputError(f"{path}: cannot be resumed from ({one_line(error)}), "
                             "expected a checkpoint of train.py") from None
        torch.set_rng_state(saved["random"])
        if saved["options"]["validation"]["sets"] == self.described["validation"]["sets"]:
            self.best = saved["best"]                           # else it is of other sets
        texts = (f"changed {text}" for text in changed.values())
        self.log("; ".join([f"resumed {path} at step {self.step}", *texts]))
        if self.writes and path.name == "previous.pth" and (last := self.folder / "last.pth").exists():
            os.replace(last, self.folder / "damaged.pth")       # not previous.pth, at the next save

    def log_plan(self, lines: Sequence[str], net: nn.Module, potentials: nn.Module) -> None:
        """Log what will run and the networks' sizes; in a dry run also the options."""
        of_net, of_potentials = (sum(p.numel() for p in part.parameters()) for part in (net, potentials))
        if self.dry:
            self.log(dump(self.options).rstrip())               # else they are in options.yml
        for line in [*lines, f"network {of_net:,} parameters, potentials {of_potentials:,} (training only)"]:
            self.log(line)

    def add_validation(self, step: int, rows: Sequence[Row], net: nn.Module) -> None:
        """Log and add to validation.csv what a network scored; the best one so far goes to best.pth."""
        average = average_row(rows)
        for row in [*rows, average] if average else rows:
            if row.scores:
                self.log(f"step {step} {row.set}: {row.scores['psnr']:.2f} dB / {row.scores['ssim']:.4f} "
                         f"({row.images} images; input {row.scores_in['psnr']:.2f} dB)")
            line = [step, row.set, row.images, *scores_of(row, ("psnr", "ssim"))]
            append_row(self.folder / "validation.csv", line)
        if average and average.scores["psnr"] > self.best:
            self.best = average.scores["psnr"]
            save_checkpoint(self.folder / "best.pth", self.weights(step, net))

    def weights(self, step: int, net: nn.Module) -> dict:
        """What a checkpoint holds for use: a network's weights, its arguments, and the step."""
        weights = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
        return {"net": weights, "network": dataclasses.asdict(self.options.network), "step": step}

    def save(self, step: int, net: nn.Module) -> None:
        """Write last.pth, which offers a network's weights for use; the one before becomes previous.pth."""
        if self.writes:
            train = {name: part.state_dict() if part else None for name, part in self.state.items()}
            train |= {"best": self.best, "options": self.described, "random": torch.get_rng_state()}
            save_checkpoint(self.folder / "last.pth", {**self.weights(step, net), "train": train},
                            self.folder / "previous.pth")

    def watch_signals(self) -> None:
        """From now, SIGINT and SIGTERM let the step end and be saved; Ctrl-C a second later ends at once."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.signals and time.monotonic() - self.signals[0][1] > 1:
            raise KeyboardInterrupt
        self.signals.append((signal.Signals(number), time.monotonic()))

    def stop_requested(self, step: int) -> bool:
        """Whether a signal came to any process; all say the same."""
        if not torch.distributed.is_initialized():
            return bool(self.signals)
        agreeing = self.device.type == "cpu" or step % AGREE_EVERY == 0
        came = torch.tensor(float(bool(self.signals)), device=self.device)
        return agreeing and distributed.average_(came).item() > 0

    def interruption(self, step: int, steps: int) -> InputError:
        """The error that ends a run which a signal stopped, once it is saved."""
        number = self.signals[0][0] if self.signals else signal.SIGTERM         # another process got it
        message = f"stopped by {number.name} at step {step} of {steps}: saved, continue with --resume"
        return InputError(message, status=128 + number)


def lock(folder: Path, log: Callable[[str], None]) -> None:
    """Lock a run's folder for as long as this process lives; InputError where another one trains there."""
    descriptor = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o666)
    try:
        import fcntl

        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):                  # which of them depends on the system
        raise InputError(f"{folder}: another process trains there, expected another name") from None
    except (ImportError, OSError) as error:                     # Windows, network shares
        log(f"{folder} cannot be locked ({error}): do not train there twice at a time")


def changes(then: Any, now: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Names of options that differ between two runs, with "name: then -> now"; of those that both have."""
    if isinstance(now, dict):
        for key in filter(then.__contains__, now):
            yield from changes(then[key], now[key], f"{name}.{key}".removeprefix("."))
    elif isinstance(now, list) and now and isinstance(now[0], dict):
        yield from changes(len(then), len(now), name)
        for i, entries in enumerate(zip(then, now, strict=False)):
            yield from changes(*entries, f"{name}[{i}]")
    elif then != now:
        yield name, f"{name}: {then} -> {now}"


class LossTable:
    """losses.csv: a row of the means since the last one.

    Beside TERMS it has how many steps the sides skipped. All is summed on the device: nothing waits for it
    until a row is written.
    """

    def __init__(self, run: Run, sides: Iterable[Side]) -> None:
        self.run, self.sides, self.skipped, self.start = run, list(sides), 0, time.monotonic()
        # Sums, and of how many finite values.
        self.terms = torch.zeros(2, len(TERMS), dtype=torch.float64, device=run.device)
        self.absent = torch.tensor(math.nan, device=run.device)
        if run.writes:
            columns = ("step", "seconds", "learning_rate", *TERMS, "skipped")
            cut_table(run.folder / "losses.csv", columns, run.step)

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """A step's terms, by their names in TERMS."""
        assert terms.keys() <= {*TERMS}, f"no columns for {terms.keys() - {*TERMS}}"
        values = torch.stack([terms.get(name, self.absent) for name in TERMS])
        finite = values.isfinite()
        self.terms += torch.stack([values.where(finite, 0.0), finite])

    def write(self, step: int, learning_rate: float) -> dict[str, float]:
        """Write and return a step's row: means over steps and processes, nan without a finite value.

        InputError where a side has skipped its last NOT_APPLIED steps, or that of a dry run.
        """
        total, steps = distributed.average_(self.terms)
        values = dict(zip(TERMS, (total / steps).tolist(), strict=True))
        self.terms.zero_()
        before, self.skipped = self.skipped, int(sum(side.skipped for side in self.sides))
        values["skipped"] = self.skipped - before
        if values["skipped"]:
            self.run.log(f"step {step}: {values['skipped']} not applied since the last reading, "
                         "loss or gradient not finite")
        if self.run.writes:
            row = [step, f"{time.monotonic() - self.start:.1f}", f"{learning_rate:.3g}"]
            append_row(self.run.folder / "losses.csv", row + [f"{value:.6g}" for value in values.values()])
        in_a_row = max(int(side.skipped_in_a_row) for side in self.sides)
        if in_a_row >= NOT_APPLIED or in_a_row and self.run.dry:
            good = self.run.folder / "last.pth"
            good = f"the last good checkpoint is {good}" if good.exists() else "no checkpoint yet"
            raise InputError(f"step {step}: loss or gradient not finite, {in_a_row} steps in a row; {good}")
        return values
