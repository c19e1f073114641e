"""Training in less memory (activation checkpointing): what a block's backward pass computes again."""

import functools

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from models.restormer import TransformerBlock
from utils.errors import InputError


def keep_expensive_maps(_, operation, *arguments, **__) -> CheckpointPolicy:
    """Keep the attention's matrix products and the feed-forward's wide input maps."""
    kept = operation is torch.ops.aten.bmm.default
    if operation is torch.ops.aten.convolution.default:
        # Only where it widens: to compute the others again costs little for the memory that they free.
        weight, groups = arguments[1], arguments[8]
        kept = groups == 1 and weight.shape[0] > weight.shape[1]
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


class RecomputedBlock(TransformerBlock):
    """A transformer block that keeps its input alone for the backward pass; same outputs and gradients."""

    contexts = {}

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        return checkpoint(super().forward, x, use_reentrant=False, preserve_rng_state=False, **self.contexts)


class CheaplyRecomputedBlock(RecomputedBlock):
    """A transformer block that also keeps what is expensive to compute again."""

    contexts = {"context_fn": functools.partial(create_selective_checkpoint_contexts, keep_expensive_maps)}


def recompute(net: nn.Module, how: str) -> None:
    """Have the blocks of a network keep less for the backward pass from now on. Its copies do the same.

    how: "cheap" keeps what is expensive to compute again; "all" keeps a block's input alone, for another
    forward pass; "none" keeps all, as a new network does.
    """
    if how != "none" and not any(isinstance(block, TransformerBlock) for block in net.modules()):
        raise InputError(f"recompute: {how}, but the backbone has no Restormer blocks, expected none")
    kind = {"none": TransformerBlock, "cheap": CheaplyRecomputedBlock, "all": RecomputedBlock}[how]
    for block in net.modules():
        if isinstance(block, TransformerBlock):
            block.__class__ = kind
