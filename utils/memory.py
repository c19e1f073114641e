"""Memory of a training run: what is recomputed in the backward pass instead of kept, and what the allocator does with freed memory."""

import ctypes
import functools
import sys

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from models.restormer import TransformerBlock


def keep_freed_memory() -> None:
    """Let the process keep the memory that it frees (glibc), for a CPU that needs the same again in each step.

    By default it goes back to the system and comes again page by page, cleared: often more work than the arithmetic. Strips
    do not need it, and with the maps of large photographs the heap would fragment.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)            # not in other C libraries
        mallopt(-4, 0)                                          # M_MMAP_MAX: no block is mapped on its own
        mallopt(-1, -1)                                         # M_TRIM_THRESHOLD: the heap does not shrink
        mallopt(-2, 2**26)                                      # M_TOP_PAD: it grows in large pieces


def _products_are_kept(_, operation, *arguments, **__) -> CheckpointPolicy:
    kept = operation is torch.ops.aten.bmm.default
    if operation is torch.ops.aten.convolution.default:
        # Only where it widens: others are cheap for the memory that they free, and the last one's result is not needed again at all.
        weight, groups = arguments[1], arguments[8]
        kept = groups == 1 and weight.shape[0] > weight.shape[1]
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def recompute(module: nn.Module, x: Tensor, everything: bool = False) -> Tensor:
    """module(x), keeping less for the backward pass of its transformer blocks.

    Of a block, the feed-forward's wide input maps and the attention's matrix products are kept; the rest is computed again.
    everything: nothing but a block's input is kept, at the price of another forward pass.
    """
    if isinstance(module, TransformerBlock) and torch.is_grad_enabled():
        contexts = {} if everything else {"context_fn": functools.partial(create_selective_checkpoint_contexts, _products_are_kept)}
        return checkpoint(module, x, use_reentrant=False, preserve_rng_state=False, **contexts)
    if isinstance(module, nn.Sequential):
        for part in module:
            x = recompute(part, x, everything)
        return x
    return module(x)
