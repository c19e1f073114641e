"""Train BaryIR: one network for many degradations, its latent split by optimal transport.

    python train.py --opt options/train_5d.yml                        one GPU, or a CPU
    torchrun --nproc_per_node 4 train.py --opt options/train_5d.yml --set objective.gamma=0.02     four GPUs
    python train.py --opt options/train_5d.yml --resume               continue where it stopped, or was killed
    python train.py --opt options/train_5d.yml --dry-run              check options and images, save nothing

Sample i, of source (degradation) k_i, has a latent z_i = encoder(degraded), a barycenter latent b_i = T(z_i)
with one T for all sources, a residual r_i = z_i - b_i and a transport cost C_i (losses/barycenter.py). E_k is
the mean over source k, lambda_k its weight; potentials f_1..f_K are congruent, sum_k lambda_k f_k = 0. With

    L = sum_k lambda_k E_k[ C_i - f_k(b_i) ],    max_f min_T L,    R = mean|restored - clean|

two sides alternate:

    scheme     step          moves                  by descending
    joint      map           encoder, T, decoder    w_rec R + L
    separate   transport     T                      L, latents standardised
               restoration   encoder, decoder       R
    both       potential     f_1..f_K               sum_k lambda_k E_k[ f_k(b_i) ], their part of -L

Scheme reconstruction has the restoration step alone, of encoder, T and decoder: no transport (an
ablation). z and b end in the same layer norm, which is the encoder's.
"""

import dataclasses
import functools
from argparse import Namespace
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from data.cache import check, decode_all
from data.datasets import TrainingSet, open_sets
from data.sampler import EpochSampler, make_loader, probabilities
from data.transforms import to_batch
from losses import barycenter
from models.baryir import BaryIR
from models.potentials import Potentials
from utils import distributed
from utils.checkpoint import load_weights, read_checkpoint
from utils.errors import naming, one_line_errors
from utils.evaluation import VALIDATION, precision_on, validate
from utils.graphs import Recorded
from utils.memory import keep_freed_memory
from utils.metrics import Metrics
from utils.options import TrainOptions, load_options, option_parser
from utils.runs import LossTable, Run
from utils.sides import Side, learning_rate_factor, make_side

TRANSPORT_BETAS = (0.9, 0.99)                   # of Adam, for T and the potentials in scheme separate
TRANSPORT_CLIP = 1.0                            # largest gradient norm of T in scheme separate
Terms = dict[str, Tensor]


class Batch(NamedTuple):
    degraded: Tensor        # [B,3,P,P]
    clean: Tensor           # [B,3,P,P]
    source: Tensor          # k_i, [B]; -1: a clean input, of no source
    weights: Tensor         # lambda_{k_i} / (B p_{k_i}), [B]; 0 for clean inputs
    low_weight: Tensor      # of the low band in the reconstruction


def parse_arguments(arguments: list[str] | None) -> Namespace:
    parser = option_parser(__doc__)
    add = parser.add_argument
    add("--resume", action="store_true", help="continue the run from its newest checkpoint that can be read")
    add("--dry-run", action="store_true", help="print options, data, one step's losses; decode every image")
    return parser.parse_args(arguments)


def reconstruction_of(restored: Tensor, batch: Batch, options: TrainOptions) -> tuple[Tensor, Tensor]:
    """The reconstruction loss, plain or in two bands, and the mean error."""
    in_bands = any(options.objective.low_weight)
    return barycenter.reconstruction_loss(restored, batch.clean, batch.low_weight if in_bands else None)


def growing_average(averaged: list[Tensor], current: list[Tensor], steps: Tensor, decay: float) -> None:
    """Average of weights whose decay at step t is min(decay, (1 + t) / (10 + t)): it forgets the first."""
    weight = 1 - ((1 + steps) / (10 + steps)).clamp(max=decay)          # stays on the device: nothing waits
    differences = torch._foreach_sub(current, averaged)
    torch._foreach_mul_(differences, weight)
    torch._foreach_add_(averaged, differences)


def autocast(tensor: Tensor, options: TrainOptions) -> torch.autocast:
    return torch.autocast(tensor.device.type, torch.bfloat16, enabled=options.precision == "bfloat16")


# Map step: encoder, T and decoder descend, the potentials are frozen.
def map_step(net: BaryIR, potentials: Potentials, side: Side, batch: Batch,
             options: TrainOptions) -> Terms:
    degraded, source, weights = batch.degraded, batch.source, batch.weights
    objective = options.objective
    side.thaw()
    with autocast(degraded, options):                           # z, b and restored come out in float32
        z, skips = net.encode(degraded)
        b = net.transport(z)
        restored = net.decode(b, z - b, skips)
    f = potentials(b)
    costs = barycenter.transport_cost(z, b, source, objective.cost, objective.gamma)
    dual = barycenter.dual_objective(costs["cost"], f, source, weights)
    reconstruction, error = reconstruction_of(restored, batch, options)
    loss = objective.w_rec * reconstruction + dual
    loss.backward()
    norm = side.average_and_clip(loss, options.clip)            # not finite: the optimizer moves nothing
    side.optimizer.step()
    side.freeze()
    return {"map_loss": loss.detach(), **barycenter.dual_terms(dual, costs, weights),
            "reconstruction": error, "gradient_norm": norm}


# Potential step: the potentials descend on b of the updated T, the network is frozen.
def potential_step(net: BaryIR, potentials: Potentials, side: Side, batch: Batch, options: TrainOptions,
                   z: Tensor | None = None) -> Terms:
    with torch.no_grad(), autocast(batch.degraded, options):
        if z is None:
            z, _ = net.encode(batch.degraded)
        b = net.transport(z)                                    # encoder and T only, never the decoder
    side.thaw()
    f = potentials(b)
    penalty = options.objective.penalty
    loss = barycenter.potential_objective(f, batch.source, batch.weights, potentials.lambdas, penalty)
    loss.backward()
    norm = side.average_and_clip(loss)
    side.optimizer.step()
    side.freeze()
    error = barycenter.congruence_error(f.detach(), potentials.lambdas)
    return {"potential_loss": loss.detach(), "congruence_error": error, "potential_gradient_norm": norm}


# Transport step (scheme separate): T alone descends; z and the potentials are frozen.
def transport_step(net: BaryIR, potentials: Potentials, side: Side, batch: Batch, options: TrainOptions,
                   z: Tensor) -> Terms:
    objective = options.objective
    side.thaw()
    with autocast(z, options):
        b = net.transport(z)
    f = potentials(b)
    # Transport is posed in (latent - m) / s; potentials(b) standardises b itself.
    costs = barycenter.transport_cost(potentials.standardize(z), potentials.standardize(b), batch.source,
                                      objective.cost, objective.gamma)
    loss = barycenter.dual_objective(costs["cost"], f, batch.source, batch.weights)
    loss.backward()
    norm = side.average_and_clip(loss, TRANSPORT_CLIP)
    side.optimizer.step()
    side.freeze()
    return {**barycenter.dual_terms(loss, costs, batch.weights), "transport_gradient_norm": norm}


# Restoration step (scheme separate): encoder and decoder descend; the gradient passes through the frozen T.
# In scheme reconstruction the side holds T, too.
def restoration_step(net: BaryIR, side: Side, batch: Batch, options: TrainOptions, z: Tensor,
                     skips: list[Tensor]) -> Terms:
    side.thaw()
    with autocast(z, options):
        b = net.transport(z)
        restored = net.decode(b, z - b, skips)
    loss, error = reconstruction_of(restored, batch, options)
    loss.backward()
    norm = side.average_and_clip(loss, options.clip)
    side.optimizer.step()
    side.freeze()
    return {"reconstruction": error, "gradient_norm": norm}


def joint_steps(net: BaryIR, potentials: Potentials, sides: dict[str, Side], options: TrainOptions,
                batch: Batch) -> Terms:
    """Scheme joint, the paper's: a map step and a potential step."""
    terms = map_step(net, potentials, sides["map"], batch, options)
    return terms | potential_step(net, potentials, sides["potential"], batch, options)


def separate_steps(net: BaryIR, potentials: Potentials, sides: dict[str, Side], options: TrainOptions,
                   batch: Batch) -> Terms:
    """Scheme separate: `map_steps` transport steps and a potential step on z, then a restoration step.

    In scheme reconstruction there is the last one alone.
    """
    sides["restoration"].thaw()                 # so that z has a graph
    with autocast(batch.degraded, options):
        z, skips = net.encode(batch.degraded)
    sides["restoration"].freeze()               # z keeps it; T must not move the layer norm
    terms = {}
    if options.scheme == "separate":
        latents = z.detach()
        potentials.standardize.update(latents)
        for _ in range(options.map_steps):
            terms = transport_step(net, potentials, sides["transport"], batch, options, latents)
        terms |= potential_step(net, potentials, sides["potential"], batch, options, latents)
    return terms | restoration_step(net, sides["restoration"], batch, options, z, skips)


def make_sides(net: BaryIR, potentials: Potentials, options: TrainOptions,
               recorded: bool = False) -> dict[str, Side]:
    """The sides of the alternation: each has the parameters that it moves, and their optimizer."""
    make = functools.partial(make_side, options.optimizer, recorded=recorded)
    rate, potential_rate = options.learning_rate, options.potential_learning_rate
    if options.scheme == "joint":
        return {"map": make(net.parameters(), rate),
                "potential": make(potentials.parameters(), potential_rate)}
    if options.scheme == "reconstruction":
        return {"restoration": make(net.parameters(), rate)}
    of_transport = net.transport_map.parameters()
    others = [p for name, p in net.named_parameters() if not name.startswith("transport_map.")]
    return {"restoration": make(others, rate),
            "transport": make(of_transport, options.transport_learning_rate, betas=TRANSPORT_BETAS),
            "potential": make(potentials.parameters(), potential_rate, betas=TRANSPORT_BETAS)}


def main(arguments: list[str] | None = None, make_network: Callable[..., BaryIR] = BaryIR) -> None:
    # Setup options, processes, the run: its folder, and the checkpoint from which it goes on, if any.
    flags = parse_arguments(arguments)
    options = load_options(TrainOptions, flags.opt, flags.set)
    rank, processes, device = distributed.setup()
    options.precision = precision_on(device, options.precision)
    torch.manual_seed(options.seed)
    keep_freed_memory(device)
    run = Run(options, flags.resume, device, dry=flags.dry_run)

    # Setup data:
    problems = [] if flags.dry_run else None                    # a dry run lists all of them
    entries = open_sets(options.sources, options, "sources", run.log, problems)
    sets = open_sets(options.validation.sets, options, "validation.sets", run.log, problems)
    check(options.file, entries, sets, Metrics().smallest(VALIDATION), problems)
    cache = decode_all(entries) if options.cache and not flags.dry_run else None
    training_set = TrainingSet(entries, options.seed, cache, options.clean_share, options.camera_share)
    counts = training_set.samples_per_epoch                     # N_k

    # Setup networks: lambda, BaryIR (encoder, T, decoder), the potentials, the average of the weights.
    with naming(f"{options.file}: objective.lambdas"):
        lambdas = barycenter.source_weights(counts, options.objective.lambdas).to(device)
    drawn = probabilities(counts, options.balanced).to(device) * (1 - options.clean_share)      # p_k
    with naming(f"{options.file}: network"):
        net = make_network(**dataclasses.asdict(options.network)).to(device)
    if options.pretrained and not run.checkpoint:
        weights = read_checkpoint(options.pretrained)["net"]
        load_weights(net, weights, f"{options.file}: pretrained: {options.pretrained}")
    potentials = Potentials(lambdas, net.latent_channels, congruent=not options.objective.penalty,
                            standardized=options.scheme == "separate").to(device)
    net = net.to(memory_format=torch.channels_last)
    average = functools.partial(growing_average, decay=options.ema)
    ema = AveragedModel(net, multi_avg_fn=average) if options.ema else None
    deployed = ema.module if ema else net               # what validation measures and checkpoints offer
    if options.recompute:
        net.recompute_blocks()

    # Setup the sides of the alternation; everything is frozen, each step thaws its own.
    recorded = device.type == "cuda" and processes == 1         # each step is a CUDA graph (utils/graphs.py)
    sides = make_sides(net, potentials, options, recorded)
    net.requires_grad_(False)
    potentials.requires_grad_(False)

    alternate = joint_steps if options.scheme == "joint" else separate_steps
    alternate = functools.partial(alternate, net, potentials, sides, options)
    if recorded:
        alternate = Recorded(alternate)

    # Setup state: what the run needs to go on exactly; its place in the epoch follows from the step.
    state = {"net": net, "potentials": potentials, "ema": ema}
    state |= {f"{name}_optimizer": side.optimizer for name, side in sides.items()}
    sampling = {"samples_per_step": options.batch * processes, "samples_per_epoch": counts}
    step = run.resume(state, sampling)
    sampler = EpochSampler.of_run(options, counts, step, rank, processes)
    steps = sampler.steps
    loader = make_loader(training_set, sampler, 0 if flags.dry_run else options.workers, device)
    losses = LossTable(run, sides.values())
    samples, epochs = sampler.samples_before(steps), sampler.epochs_before(steps)
    run.log_plan([*training_set.describe(lambdas.tolist()),
                  *(f"validation {images.name}: {images.describe()}" for images in sets),
                  f"{steps} steps, {samples:,} samples, {epochs:.1f} epochs "
                  f"on {processes} x {device} in {options.precision}"], net, potentials)

    # Train: the alternation, batch by batch.
    run.watch_signals()
    bar = tqdm(None, options.name, steps, initial=step, dynamic_ncols=True, disable=not run.writes)
    with bar, distributed.naming_dead_processes():
        for degraded, clean, source in loader:
            factor = learning_rate_factor(options, step, steps, sampler.epochs_before(step))
            for side in sides.values():
                side.set_learning_rate(factor)
            degraded, clean = (to_batch(images.to(device, non_blocking=True)) for images in (degraded, clean))
            source = source.to(device, non_blocking=True)
            first, last = options.objective.low_weight
            low_weight = torch.full((), first + (last - first) * step / steps, device=device)
            weights = barycenter.sample_weights(source, lambdas, drawn)
            batch = Batch(degraded, clean, source, weights, low_weight)

            step += 1
            terms = alternate(batch)
            if ema:
                ema.update_parameters(net)
            losses.add(terms)
            bar.update()

            if flags.dry_run:
                values = losses.write(step, options.learning_rate * factor)
                means = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if value == value)
                return run.log(f"one step: {means}; no problems; a dry run saves nothing")
            if step % options.log_every == 0 or step == steps:
                values = losses.write(step, options.learning_rate * factor)
                shown = ["reconstruction"] + ["dual"] * (options.scheme != "reconstruction")
                bar.set_postfix({name: f"{values[name]:.3g}" for name in shown})
            if sets and rank == 0 and (step % options.validation.every == 0 or step == steps):
                run.add_validation(step, validate(deployed, sets), deployed)
            stop = run.stop_requested(step)
            if step % options.save_every == 0 or step == steps or stop:
                run.save(step, deployed)
            if stop and step < steps:
                raise run.interruption(step, steps)
    if processes > 1:
        torch.distributed.destroy_process_group()
    run.log(f"done: {steps} steps, weights in {run.folder / 'last.pth'}")


if __name__ == "__main__":
    with one_line_errors():
        main()
