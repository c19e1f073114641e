"""A run that goes on from its checkpoint: what must not have changed since, and its state and tables put back to that step."""

import csv
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel

from models.baryir import BaryIR
from models.potentials import Potentials
from utils.errors import InputError
from utils.files import write_csv
from utils.options import TrainOptions

FIXED = ("network", "potentials", "optimizer", "ema", "moves", "scheme")              # a checkpoint does not fit others
SAME_RUN = ("sources", "seed", "objective")                                 # others make it another run


def resume(path: Path, checkpoint: dict, options: TrainOptions, more: dict, allow_changes: bool, net: BaryIR, potentials: Potentials,
           ema: AveragedModel | None, optimizers: dict[str, torch.optim.Optimizer], standardize: torch.nn.Module | None,
           device: torch.device) -> tuple[int, float, list[str]]:
    """Put a run into the state of its checkpoint. Returns the step, the best validation PSNR and the options that differ, one text each.

    InputError where the checkpoint is of another run: other options of FIXED or, unless allowed, of SAME_RUN (how often a source is
    listed may change). more: further facts of a run beside its options, by name.
    """
    try:
        state, step = checkpoint["train"], int(checkpoint["step"])
        then, now = state["options"], {**dataclasses.asdict(options), **more}
        if len(then["sources"]) != len(now["sources"]):
            raise InputError(f"{options.file}: sources: {len(now['sources'])}, but {path} was trained on {len(then['sources'])}; a run cannot continue with them")
        changed: dict[str, list[str]] = {}
        for name, before, after in differences(then, now):
            key = "repeat" if name.endswith(".repeat") else re.split(r"[.[]", name)[0]
            changed.setdefault(key, []).append(f"{name}: {before} -> {after}")
        changed.pop("file", None)
        for key in changed:
            if key in FIXED or key in SAME_RUN and not allow_changes:
                way = "a run cannot continue with it" if key in FIXED else "it would be another run; --allow-changes continues nevertheless"
                raise InputError(f"{options.file}: {', '.join(changed[key])}, since {path}; {way}")
        net.load_state_dict(state["net"])
        potentials.load_state_dict(state["potentials"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state[f"{name}_optimizer"])
            for group in optimizer.param_groups:
                group["weight_decay"] = options.weight_decay
        if standardize:
            standardize.load_state_dict(state["standardize"])
        if ema:
            ema.load_state_dict(state["ema"])
        torch.set_rng_state(state["random"])
        if device.type == "cuda" and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], device)
        measured_otherwise = any(text.startswith(("validation.sets", "validation.protocol")) for text in changed.get("validation", []))
        best = -math.inf if measured_otherwise else float(state["best"])
        return step, best, [f"changed {text}" for texts in changed.values() for text in texts]
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{path}: has no {error}, expected a checkpoint of train.py to resume from, not weights only") from None
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(f"{path}: cannot be resumed from ({' '.join(str(error).split())[:300]}), expected a checkpoint of train.py") from None


def differences(then: object, now: object, name: str = "") -> Iterator[tuple[str, object, object]]:
    """Name, former and present value of what differs between two nested options; keys that `then` does not have are new ones."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in now:
            yield from differences(then.get(key, now[key]), now[key], f"{name}.{key}" if name else key)
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for i, (a, b) in enumerate(zip(then, now)):
            yield from differences(a, b, f"{name}[{i}]")
    elif then != now:
        yield name, then, now


def cut_table(path: Path, columns: Sequence[str], step: int) -> list[str]:
    """Begin a CSV file, or cut an earlier one back to its rows up to `step`. Returns its columns.

    These are the given ones, then those that the earlier file alone has; a row has nan where it lacks one.
    """
    rows, columns = [], list(columns)
    if step and path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            header, *lines = csv.reader(file)
        columns += [name for name in header if name not in columns]
        whole = [dict(zip(header, line)) for line in lines if len(line) == len(header)]
        rows = [[row.get(name, "nan") for name in columns] for row in whole if row.get("step", "").isdigit() and int(row["step"]) <= step]
    write_csv(path, [columns, *rows])
    return columns
