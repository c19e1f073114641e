"""The processes of a run: what ended one is one line with the cure."""

import pytest
import torch

from utils import distributed
from utils.errors import InputError


@pytest.mark.parametrize("text, message", [
    ("Caught RuntimeError in DataLoader worker process 0.\nunable to allocate shared memory(shm) for file "
     "</torch_1>: No space left on device (28)", "shared memory .* is full, expected .*--shm-size"),
    ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that", "is full, expected"),
    ("DataLoader worker (pid(s) 7) exited unexpectedly", r"died \(exited unexpectedly\) while it read"),
    ("Too many open files. Communication with the workers is no longer possible.", r"\(ulimit -n\), fewer"),
    ("received 0 items of ancdata", "too many open files, expected a higher limit"),
])
def test_what_ends_workers_is_named(text, message):
    with pytest.raises(InputError, match=message), distributed.naming_dead_processes():
        raise RuntimeError(text)


def test_other_errors_stay():
    with pytest.raises(RuntimeError, match="shapes"), distributed.naming_dead_processes():
        raise RuntimeError("shapes do not fit")


def test_more_processes_than_gpus(monkeypatch):
    for name, value in {"WORLD_SIZE": "3", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="torchrun started 3 processes, expected one for each of 2 GPUs"):
        distributed.setup()
