"""What a process does with memory that it frees."""

import ctypes
import sys

import torch


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
