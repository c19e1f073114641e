"""A training run's folder: its lock, log, tables and checkpoints, and what a signal asks of the run."""

import ctypes
import dataclasses
import math
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.datasets import ImageSet
from data.sampler import EpochSampler
from utils import distributed
from utils.checkpoint import changes, network_content, newest_checkpoint, read_checkpoint, save_checkpoint
from utils.errors import InputError, first_few, one_line, printable
from utils.evaluation import average_row, evaluate
from utils.files import append_row, append_text, cut_table, remove_partial, write_text
from utils.options import TrainOptions, dump
from utils.sides import Side

CHECKPOINTS = ("last.pth", "previous.pth")
TERMS = ("map_loss", "reconstruction", "dual", "distance", "contrastive", "orthogonality", "potential",
         "gradient_norm", "transport_gradient_norm", "potential_loss", "congruence_error",
         "potential_gradient_norm")                             # columns of losses.csv
VALIDATION = ("step", "set", "images", "psnr_in", "ssim_in", "psnr", "ssim")    # columns of validation.csv
NOT_APPLIED = 10            # so many steps in a row whose loss or gradient is not finite end a run
AGREE_EVERY = 5             # steps between GPU processes' exchanges of signals: torchrun kills after 30 s


class Run:
    """A run's folder `output/name`, locked for as long as the process lives.

    It holds options.yml, train.log, losses.csv, validation.csv, last.pth, previous.pth (the one before,
    should the last be damaged) and best.pth. Of several processes the first one writes.

    Args:
        resume: None for a new run, "" for the newest checkpoint of the folder, or a checkpoint's path.
        dry: nothing is locked or written.

    InputError where the folder holds another run, is in use, or has nothing to resume from.
    """

    def __init__(self, options: TrainOptions, resume: str | None, dry: bool = False) -> None:
        self.options, self.folder = options, Path(options.output) / options.name
        self.writes = distributed.rank() == 0 and not dry
        self.step, self.best, self.checkpoint, self.signals, self.columns = 0, -math.inf, None, [], {}
        holds_run = any((self.folder / name).exists() for name in CHECKPOINTS)
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0    # torchrun --max-restarts
        if restarted and (holds_run or resume is None):
            resume = ""
        own = resume == "" or resume and Path(resume).resolve().parent == self.folder.resolve()
        if holds_run and not own and not dry:
            raise InputError(f"{self.folder} holds a run already: continue it with --resume, "
                             "or give this one another name")
        if resume == "" and not self.folder.exists() and not restarted:
            raise InputError(f"--resume: no run {self.folder}, expected the name of one that was started")
        if resume:
            self.checkpoint = Path(resume), read_checkpoint(resume)
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock(self.folder)
            remove_partial(self.folder)
        if resume == "":
            self.checkpoint = newest_checkpoint(self.folder, self.log)
            if not self.checkpoint:
                self.log(f"{self.folder} holds no checkpoint yet: the run begins anew")

    def log(self, message: str) -> None:
        """Print a message, and add it to train.log."""
        if distributed.rank() == 0:
            tqdm.write(printable(message) if "\n" not in message else message)
        if self.writes:
            append_text(self.folder / "train.log", f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")

    def resume(self, state: Mapping, facts: dict, allow_changes: bool, device: torch.device) -> None:
        """Put networks and optimizers into the checkpoint's state, if any, and the tables back to its step.

        Args:
            state: by name, what has a state_dict and is needed to go on exactly; None for what the run lacks.
            facts: further facts of the run beside its options.

        InputError where the checkpoint is of another run.
        """
        self.state, self.device = state, device
        self.described = {**dataclasses.asdict(self.options), **facts}
        if self.checkpoint:
            self._load(*self.checkpoint, allow_changes)
            self.checkpoint = None                              # frees its memory
        if self.writes:
            write_text(self.folder / "options.yml", dump(self.options))
        self.begin_table("validation.csv", VALIDATION)

    def _load(self, path: Path, content: dict, allow_changes: bool) -> None:
        """Go on from a checkpoint."""
        if "train" not in content:
            raise InputError(f"{path}: has no 'train', expected a checkpoint of train.py to resume from, "
                             "not weights only")
        self.step, saved = content["step"], content["train"]
        changed = changes(path, saved["options"], self.options.file, self.described, allow_changes)
        try:
            for name, part in self.state.items():
                if part:
                    part.load_state_dict(saved[name])
        except (KeyError, ValueError, RuntimeError) as error:
            raise InputError(f"{path}: cannot be resumed from ({one_line(error)}), "
                             "expected a checkpoint of train.py") from None
        torch.set_rng_state(saved["random"])
        if self.device.type == "cuda" and saved["random_cuda"] is not None:
            torch.cuda.set_rng_state(saved["random_cuda"], self.device)
        own = path.resolve().parent == self.folder.resolve()    # else best.pth is the other run's
        if own and not any(text.startswith("changed validation.sets") for text in changed):
            self.best = saved["best"]
        self.log("; ".join([f"resumed {path} at step {self.step}", *changed]))
        if self.writes and own and path.name == "previous.pth" and (self.folder / "last.pth").exists():
            os.replace(self.folder / "last.pth", self.folder / "damaged.pth")           # not previous.pth

    def report(self, sources: Sequence[str], sets: Sequence[ImageSet], net: nn.Module, potentials: nn.Module,
               sampler: EpochSampler, device: torch.device) -> None:
        """Log what will run: sources, validation sets, sizes; in a dry run also the options."""
        if not self.writes:
            self.log(dump(self.options).rstrip())               # else they are in options.yml
        for line in [*sources, *(f"validation {images.name}: {images.describe()}" for images in sets)]:
            self.log(line)
        of_net, of_potentials = (sum(p.numel() for p in part.parameters()) for part in (net, potentials))
        self.log(f"network {of_net:,} parameters, potentials {of_potentials:,} (training only); "
                 f"{sampler.steps} steps, {sampler.samples_before(sampler.steps):,} samples, "
                 f"{sampler.epochs_before(sampler.steps):.1f} epochs "
                 f"on {sampler.processes} x {device} in {self.options.precision}")

    def progress(self, step: int, steps: int) -> tqdm:
        """The run's progress bar."""
        return tqdm(None, self.options.name, steps, initial=step, dynamic_ncols=True, disable=not self.writes)

    def done(self, steps: int) -> None:
        best = f" and {self.folder / 'best.pth'} (best {self.best:.2f} dB)" if self.best > -math.inf else ""
        self.log(f"done: {steps} steps, weights in {self.folder / 'last.pth'}{best}")

    def begin_table(self, name: str, columns: Sequence[str]) -> None:
        """Begin a CSV file in the folder, or cut an earlier one back to the step at which the run goes on."""
        if self.writes:
            self.columns[name] = cut_table(self.folder / name, columns, self.step)

    def add_row(self, name: str, row: Mapping) -> None:
        """Add a row, by column, to a table that was begun; nan where it lacks one."""
        if self.writes:
            append_row(self.folder / name, [row.get(column, "nan") for column in self.columns[name]])

    def save(self, step: int, offered: dict) -> None:
        """Write last.pth; the one before becomes previous.pth. offered: its net and network, for use."""
        if self.writes:
            on_cuda = self.device.type == "cuda"
            train = {name: part.state_dict() if part else None for name, part in self.state.items()}
            train |= {"best": self.best, "options": self.described, "random": torch.get_rng_state(),
                      "random_cuda": torch.cuda.get_rng_state(self.device) if on_cuda else None}
            save_checkpoint(self.folder / "last.pth", {**offered, "step": step, "train": train},
                            previous=self.folder / "previous.pth")

    def watch_signals(self) -> None:
        """From now, SIGINT and SIGTERM let the step end and be saved; Ctrl-C a second later ends at once."""
        def note(number: int, _) -> None:
            if number == signal.SIGINT and self.signals and time.monotonic() - self.signals[0][1] > 1:
                raise KeyboardInterrupt
            self.signals.append((signal.Signals(number), time.monotonic()))

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, note)

    def stopping(self, step: int, device: torch.device) -> bool:
        """Whether the run is to stop after this step; of several processes all say the same."""
        if not distributed.is_distributed():
            return bool(self.signals)
        agreeing = device.type == "cpu" or step % AGREE_EVERY == 0
        return agreeing and distributed.average_(
            torch.tensor(float(bool(self.signals)), device=device)).item() > 0

    def stopped(self, step: int, steps: int) -> InputError:
        """What to raise once the run is saved after a signal."""
        number = self.signals[0][0] if self.signals else signal.SIGTERM         # another process got it
        message = f"stopped by {number.name} at step {step} of {steps}: saved, continue with --resume"
        return InputError(message, status=128 + number)


def validate(run: Run, net: nn.Module, sets: Sequence[ImageSet], step: int) -> None:
    """Measure a network on the validation sets: lines of train.log, rows of validation.csv, best.pth."""
    rows = evaluate(net, sets, "promptir")
    average = average_row(rows)
    for row in [*rows, average] if average else rows:
        if row.scores:
            run.log(f"step {step} {row.set}: {row.scores['psnr']:.2f} dB / {row.scores['ssim']:.4f} "
                    f"({row.images} images; input {row.scores_in['psnr']:.2f} dB)")
        values = (step, row.set, row.images, *row.values(("psnr", "ssim")))
        run.add_row("validation.csv", dict(zip(VALIDATION, values, strict=True)))
    if average and average.scores["psnr"] > run.best:
        run.best = average.scores["psnr"]
        save_checkpoint(run.folder / "best.pth", {**network_content(net, run.options.network), "step": step})


def lock(folder: Path) -> None:
    """Lock a run's folder for as long as this process lives; InputError where another one trains there."""
    try:
        import fcntl

        fcntl.lockf(os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o666), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):                  # which of them depends on the system
        raise InputError(f"{folder}: another process trains there, "
                         "expected another name for this run") from None
    except ImportError:                                         # not on this system
        pass


def keep_freed_memory(device: torch.device) -> None:
    """Let the process keep memory that it frees (glibc), for a CPU that needs the same again in each step.

    By default it goes back to the system and comes again page by page, cleared: often more work than the
    arithmetic. Strips do not need it, and with the maps of large photographs the heap would fragment.
    """
    if device.type == "cpu" and sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)            # not in other C libraries
        mallopt(-4, 0)                                          # M_MMAP_MAX: no block is mapped on its own
        mallopt(-1, -1)                                         # M_TRIM_THRESHOLD: the heap does not shrink
        mallopt(-2, 2**26)                                      # M_TOP_PAD: it grows in large pieces


class SourceStatistics:
    """Mean transport cost C_i, mean and spread of f_{k_i}(b_i), by source, since the last report."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.columns = [f"{quantity}_{name}" for name in names
                        for quantity in ("cost", "potential_mean", "potential_spread")]
        self.sums = torch.zeros(len(names), 4, dtype=torch.float64, device=device)              # 1, C, f, f^2

    def add(self, cost: Tensor, f: Tensor, source: Tensor) -> None:
        """C_i and f_{k_i}(b_i) of a batch, [B] each. source: [B] int, -1 for what is of none."""
        cost, f = cost.double(), f.double()
        rows = torch.stack([torch.ones_like(f), cost, f, f.square()], dim=1)
        counts = rows.isfinite().all(dim=1, keepdim=True) & (source >= 0)[:, None]
        self.sums.index_add_(0, source.clamp(min=0), torch.where(counts, rows, 0.0))

    def report(self) -> dict[str, float]:
        """The columns' values over all processes, nan for a source without a sample; starts anew."""
        count, cost, f, square = distributed.average_(self.sums).unbind(dim=1)
        spread = (square / count - (f / count).square()).clamp(min=0).sqrt()
        values = torch.stack([cost / count, f / count, spread], dim=1).flatten().tolist()
        self.sums.zero_()
        return dict(zip(self.columns, values, strict=True))


class LossTable:
    """losses.csv and the losses' lines in train.log: a row for the means since the last one.

    Losses stay on the device until a row is written: nothing waits for it in between.
    """

    def __init__(self, run: Run, sources: Sequence[str], sides: Iterable[Side],
                 device: torch.device) -> None:
        self.run, self.sides, self.start = run, list(sides), time.monotonic()
        self.of_sources = SourceStatistics(sources, device)
        self.steps: list[Tensor] = []                           # TERMS of each, nan for one that it lacks
        self.skipped: list[Tensor] = []                         # by the sides so far, after each step
        self.skipped_before = self.in_a_row = 0
        self.absent = torch.tensor(math.nan, device=device)
        columns = ("step", "seconds", "learning_rate", *TERMS, *self.of_sources.columns, "skipped")
        run.begin_table("losses.csv", columns)

    def add(self, terms: Mapping[str, Tensor], samples: Mapping[str, Tensor], source: Tensor) -> None:
        """A step's terms, the cost and potential of its samples [B], if any, their source [B]."""
        self.steps.append(torch.stack([terms.get(name, self.absent) for name in TERMS]))
        self.skipped.append(sum(side.skipped for side in self.sides))
        if samples:
            self.of_sources.add(samples["cost"], samples["potential"], source)

    def write(self, step: int, learning_rate: float) -> dict[str, float]:
        """Write and return a step's row; InputError where NOT_APPLIED steps in a row were not applied."""
        skipped = self._skipped(step)
        values = {**self._means(), **self.of_sources.report(), "skipped": len(skipped)}
        self.steps, self.skipped = [], []
        if self.run.writes:
            line = " ".join(f"{name} {value:.4g}" for name, value in values.items())
            append_text(self.run.folder / "train.log", f"step {step} {line}\n")
        row = {"step": step, "seconds": f"{time.monotonic() - self.start:.1f}",
               "learning_rate": f"{learning_rate:.3g}"}
        row |= {name: f"{value:.6g}" for name, value in values.items()}
        self.run.add_row("losses.csv", row)
        return values

    def report_one(self, file: str) -> None:
        """Print a dry run's step; InputError where it was not finite."""
        if any(side.skipped for side in self.sides):
            raise InputError(f"{file}: one step: loss or gradient not finite")
        means = ", ".join(f"{name} {value:.4g}" for name, value in self._means().items() if value == value)
        self.run.log(f"one step: {means}")
        self.run.log("no problems; a dry run saves nothing")

    def _means(self) -> dict[str, float]:
        """Means of the terms over steps and processes, of those that are finite; nan where none is."""
        steps = torch.stack(self.steps).double()                                        # [steps, terms]
        finite = steps.isfinite()
        sums = torch.stack([steps.where(finite, 0.0).sum(dim=0), finite.sum(dim=0)])
        total, count = distributed.average_(sums)
        return dict(zip(TERMS, (total / count).tolist(), strict=True))

    def _skipped(self, step: int) -> list[int]:
        """The steps since the last row that were not applied."""
        skipped = []
        for number, count in enumerate(torch.stack(self.skipped).tolist(), step - len(self.skipped) + 1):
            self.in_a_row = self.in_a_row + 1 if count > self.skipped_before else 0
            self.skipped_before = count
            if self.in_a_row:
                skipped.append(number)
            if self.in_a_row == NOT_APPLIED:
                last = self.run.folder / "last.pth"
                good = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint yet"
                raise InputError(f"step {number}: loss or gradient not finite, {NOT_APPLIED} steps in a row; "
                                 f"{good}")
        if skipped:
            self.run.log(f"step {step}: {len(skipped)} not applied since the last reading, "
                         f"loss or gradient not finite: {first_few(map(str, skipped), 10)}")
        return skipped
