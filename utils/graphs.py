"""A training step recorded as a CUDA graph and replayed: one launch in place of thousands."""

import warnings
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3             # calls before a recording, in which libraries and optimizers make what they keep


class Recorded:
    """step(batch) for named tuples of tensors on a GPU; each set of shapes is recorded once.

    The step must not wait for the GPU nor decide by its values. What it returns is overwritten by the next
    call. A small network's step spends most of its time on launches (benchmarks/RESULTS.md, "Speed").
    """

    def __init__(self, step: Callable[..., dict[str, Tensor]]) -> None:
        self.step, self.calls, self.recordings = step, Counter(), {}
        self.aside, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        warnings.filterwarnings("ignore", message=".*capturable=True.*")            # the warm-up is meant

    def __call__(self, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        kind = tuple(tensor.shape for tensor in batch)
        self.calls[kind] += 1
        if self.calls[kind] <= WARM_UP:
            self.aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.aside):
                results = self.step(batch)
            torch.cuda.current_stream().wait_stream(self.aside)
            return results
        if kind not in self.recordings:
            own, graph = type(batch)(*(tensor.clone() for tensor in batch)), torch.cuda.CUDAGraph()
            # thread_local: the loader's thread pins the next batch's memory meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                results = self.step(own)
            self.recordings[kind] = graph, own, results
        graph, own, results = self.recordings[kind]
        for tensor, given in zip(own, batch, strict=True):
            tensor.copy_(given)
        graph.replay()
        return results
