"""The processes of a run: what ended one is one line with the cure."""

import pytest
import torch

from utils import distributed
from utils.errors import InputError


@pytest.mark.parametrize("text, kind, message", [
    ("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)", InputError,
     "shared memory .* is full, expected .*--shm-size"),
    ("DataLoader worker (pid 7) is killed by signal: Bus error. It is", InputError, "is full, expected"),
    ("Too many open files. Communication with the workers", InputError, r"\(ulimit -n\), fewer"),
    ("shapes do not fit", RuntimeError, "^shapes do not fit$"),         # any other error stays
])
def test_what_ends_workers_is_named(text, kind, message):
    with pytest.raises(kind, match=message), distributed.naming_dead_processes():
        raise RuntimeError(text)


def test_more_processes_than_gpus(monkeypatch):
    for name, value in {"WORLD_SIZE": "3", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="torchrun started 3 processes, expected one for each of 2 GPUs"):
        distributed.setup()
