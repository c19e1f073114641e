"""Train BaryIR: one network for many degradations, its latent split by optimal transport.

    python train.py --opt options/train_5d.yml                                   one GPU, or a CPU
    torchrun --nproc_per_node 4 train.py --opt options/train_5d.yml              four GPUs
    python train.py --opt options/train_5d.yml --resume                          continue exactly where it stopped, or was killed
    python train.py --opt options/train_5d.yml --dry-run                         check options and all images, save nothing

Each batch trains two sides of   max_f min_T  sum_k lambda_k E_k[ C_k(z, T(z)) - f_k(T(z)) ],   sum_k lambda_k f_k = 0:
the map step moves encoder, T and decoder, the potential step moves f_1..f_K.
"""

import argparse
import dataclasses
import functools
import math
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

from data.datasets import EpochSampler, ImageSet, TrainingSet, check_all, decode_all, open_test_sets, own_process_group
from data.transforms import to_batch
from losses.barycenter import congruence_error, map_objective, potential_objective, sample_weights, source_weights, transport_cost
from models.baryir import BaryIR, compile_stages
from models.potentials import Potentials
from models.recompute import recompute
from utils import distributed
from utils.checkpoint import load_network, newest_checkpoint, read_checkpoint, save_checkpoint
from utils.errors import InputError, first_few, one_line_errors, printable
from utils.evaluation import average_row, evaluate
from utils.files import append_row, append_text, hold, remove_partial, write_csv, write_text
from utils.gradients import FlatGradients, SkippedSteps
from utils.instruments import Means, SourceStatistics, inner_gap
from utils.memory import keep_freed_memory
from utils.option_files import dump, load_options
from utils.options import Objective, TrainOptions
from utils.resume import cut_table, resume

TERMS = ("map_loss", "reconstruction", "dual", "distance", "contrastive", "orthogonality", "potential", "gradient_norm",
         "potential_loss", "congruence_error", "potential_gradient_norm", "inner_gap")
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]           # degraded, clean [B,3,P,P], source [B], weights [B]
Terms = dict[str, torch.Tensor]


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--opt", required=True, metavar="FILE", help="option file")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override options, keys dotted")
    parser.add_argument("--resume", nargs="?", const="", metavar="PATH", help="continue the run, from its newest readable checkpoint or from PATH")
    parser.add_argument("--allow-changes", action="store_true", help="with --resume: other sources, seed or objective than before, too")
    parser.add_argument("--dry-run", action="store_true", help="print options, data and one step's losses, decode every image")
    return parser.parse_args(arguments)


def learning_rate_factor(options: TrainOptions, step: int, steps: int, steps_per_epoch: float) -> float:
    """Share of the first learning rate that holds at a step."""
    schedule = options.schedule
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    if schedule.name == "cosine":
        progress = (step - schedule.warmup) / max(1, steps - schedule.warmup)
        return schedule.minimum + (1 - schedule.minimum) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule.name == "step":
        return schedule.factor ** int(step / (schedule.every * steps_per_epoch))
    return 1.0


def make_optimizer(options: TrainOptions, parameters: list, learning_rate: float) -> torch.optim.Optimizer:
    kind = {"rmsprop": torch.optim.RMSprop, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[options.optimizer]
    fused = {} if options.optimizer == "rmsprop" else {"fused": True}            # torch has no fused RMSprop
    return kind(parameters, lr=learning_rate, weight_decay=options.weight_decay, **fused)


# Map step: encoder, T and decoder descend, the potentials are frozen (METHOD 2.1).
def map_step(net: BaryIR, potentials: Potentials, moving: list[torch.nn.Parameter], gradients: FlatGradients, optimizer: torch.optim.Optimizer,
             batch: Batch, objective: Objective, precision: str = "float32", clip: float = 0.0) -> tuple[Terms, Terms]:
    degraded, clean, source, weights = batch
    for parameter in moving:
        parameter.requires_grad_(True)
    with torch.autocast(degraded.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        z, skips = net.encode(degraded)
        b = net.transport(z)
        restored = net.decode(b, z - b, skips).float() if objective.w_rec else None
    z, b = z.float(), b.float()
    loss, terms, samples = map_objective(restored, clean, z, b, potentials(b), source, weights,
                                         objective.w_rec, objective.cost, objective.gamma, objective.tau)
    norm = gradients.descend(loss, optimizer, clip)
    net.requires_grad_(False)
    return {"map_loss": loss.detach(), **terms, "gradient_norm": norm}, samples


# Potential step: the potentials descend on b of the updated T, the network is frozen (METHOD 2.2).
def potential_step(net: BaryIR, potentials: Potentials, gradients: FlatGradients, optimizer: torch.optim.Optimizer, batch: Batch,
                   rho: float = 0.0, precision: str = "float32") -> Terms:
    degraded, _, source, weights = batch
    with torch.no_grad(), torch.autocast(degraded.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        z, _ = net.encode(degraded)
        b = net.transport(z).float()                            # encoder and T only, never the decoder
    potentials.requires_grad_(True)
    f = potentials(b)
    loss = potential_objective(f, source, weights, potentials.lambdas, rho)
    norm = gradients.descend(loss, optimizer)
    potentials.requires_grad_(False)
    error = congruence_error(f.detach(), potentials.lambdas)
    return {"potential_loss": loss.detach(), "congruence_error": error, "potential_gradient_norm": norm}


def main(arguments: list[str] | None = None) -> None:
    # Setup options:
    flags = parse_arguments(arguments)
    options = load_options(TrainOptions, flags.opt, flags.set)
    rank, processes, device = distributed.setup(options.device)
    torch.manual_seed(options.seed)
    if device.type == "cpu":
        keep_freed_memory()
    folder = Path(options.output) / options.name
    resuming = flags.resume is not None or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0     # torchrun --max-restarts
    if not flags.dry_run and not resuming and any((folder / name).exists() for name in ("last.pth", "previous.pth")):
        raise InputError(f"{folder} holds a run already: continue it with --resume, or give this one another name")
    if flags.resume == "" and not folder.exists():
        raise InputError(f"--resume: no run {folder}, expected the name of one that was started")
    log_file = None

    def log(message: str) -> None:
        if rank == 0:
            tqdm.write(printable(message) if "\n" not in message else message)
            if log_file:
                append_text(log_file, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")

    # Setup resume: the checkpoint from which the run goes on, if any.
    found, resumed = None, []
    if resuming:
        if rank == 0 and folder.exists() and not flags.dry_run:
            hold(folder)
        found = (Path(flags.resume), read_checkpoint(flags.resume)) if flags.resume else newest_checkpoint(folder, resumed.append)
        if not found:
            resumed.append(f"{folder} holds no checkpoint yet: the run begins anew")

    # Setup data:
    sources = [ImageSet(s, options.root, f"{options.file}: sources[{k}]") for k, s in enumerate(options.sources)]
    sets = open_test_sets(options.validation.sets, options.root, f"{options.file}: validation.sets", log)

    def decoding(images: Iterable, total: int) -> tqdm:
        return tqdm(images, "decoding", total, leave=False, disable=rank > 0)

    if flags.dry_run:
        check_all(sources + sets, decoding)
    cache = None
    if options.cache and not flags.dry_run:
        for turn in range(2):                                   # the first process decodes, the others map what it wrote
            if turn == (rank > 0):
                cache = decode_all(sources, decoding, folder / "decoded.bin")
            distributed.wait()
    training_set = TrainingSet(sources, [s.repeat for s in options.sources], options.seed, cache)
    stages = [(0, options.batch, options.patch)] + [tuple(stage) for stage in sorted(options.progressive)]
    steps_per_epoch = len(training_set) / (options.batch * processes)           # in the first stage
    steps = options.steps or math.ceil(options.epochs * steps_per_epoch)

    # Setup networks: lambda, the sampler's probabilities, BaryIR (encoder, T, decoder) and the potentials.
    try:
        lambdas = source_weights(training_set.samples_per_epoch, options.objective.lambdas).to(device)
    except ValueError as error:
        raise InputError(f"{options.file}: objective.lambdas: {error}") from None
    counts = torch.tensor(training_set.samples_per_epoch, dtype=torch.float64)
    probabilities = (torch.full_like(counts, 1 / len(counts)) if options.balanced else counts / counts.sum()).float().to(device)
    try:
        net = BaryIR(**dataclasses.asdict(options.network)).to(device)
    except ValueError as error:
        raise InputError(f"{options.file}: network: {error}") from None
    if options.pretrained and not found:
        try:
            net.load_state_dict(load_network(options.pretrained).state_dict())
        except RuntimeError:
            raise InputError(f"{options.file}: pretrained: {options.pretrained} has another network than the option file") from None
    exact = options.potentials.congruence == "exact"
    potentials = Potentials(lambdas, net.latent_channels, options.potentials.width, congruent=exact).to(device)
    rho = 0.0 if exact else options.potentials.penalty
    if options.channels_last:
        net = net.to(memory_format=torch.channels_last)
    ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(options.ema)) if options.ema else None
    deployed = ema.module if ema else net                       # what validation measures and checkpoints offer

    recompute(net, options.recompute)
    if options.compile:
        compile_stages(net)

    # Setup optimizers; everything is frozen, each phase thaws its own side.
    moving = net.stage_parameters(options.moves)
    map_optimizer = make_optimizer(options, moving, options.learning_rate)
    potential_optimizer = make_optimizer(options, list(potentials.parameters()), options.potential_learning_rate)
    map_gradients, potential_gradients = FlatGradients(moving), FlatGradients(list(potentials.parameters()))
    net.requires_grad_(False)
    potentials.requires_grad_(False)

    means, of_sources, skipped = Means(TERMS, device), SourceStatistics([images.name for images in sources], device), SkippedSteps()

    def to_device(batch: tuple) -> Batch:
        """A batch on the device: degraded, clean [B,3,P,P], source [B], and the weights lambda_k / (B p_k) [B]."""
        degraded, clean, source = (t.to(device, non_blocking=True) for t in batch)
        degraded, clean = (to_batch(images, options.channels_last) for images in (degraded, clean))
        return degraded, clean, source, sample_weights(source, lambdas, probabilities)

    # Inner gap: how far T is from the best map for these potentials, on patches that no step of the run sees.
    def measure_gap(batch: int, patch: int, learning_rate: float) -> float:
        rng = np.random.default_rng([options.seed, 2, step, rank])
        batches = []
        for _ in range(2 * options.gap.steps):
            samples = [training_set[request] for request in sampler.apart(rng, batch, patch)]
            degraded, _, source, weights = to_device(default_collate(samples))
            batches.append((degraded, source, weights))
        cost = functools.partial(transport_cost, cost=options.objective.cost, gamma=options.objective.gamma, tau=options.objective.tau)
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bfloat16"):
            return inner_gap(net, potentials, cost, batches[:options.gap.steps], batches[options.gap.steps:], learning_rate)

    # Setup state: both optimizers, potentials, average, random state; the position in the epoch follows from the step.
    step, best = 0, -math.inf
    more_facts = {"processes": processes, "samples_per_epoch": training_set.samples_per_epoch}          # kept beside the options
    if found:
        path, checkpoint = found
        step, best, changes = resume(path, checkpoint, options, more_facts, flags.allow_changes,
                                     net, potentials, ema, map_optimizer, potential_optimizer, device)
        resumed.append("; ".join([f"resumed {path} at step {step}", *changes]))
        if rank == 0 and path == folder / "previous.pth" and (folder / "last.pth").exists() and not flags.dry_run:
            os.replace(folder / "last.pth", folder / "damaged.pth")             # or it would become the previous one at the next save
        del found, checkpoint

    # Setup logs, cut back to the step from which a resumed run continues:
    if rank == 0 and not flags.dry_run:
        folder.mkdir(parents=True, exist_ok=True)
        hold(folder)
        remove_partial(folder)
        write_text(folder / "options.yml", dump(options))
        log_file = folder / "train.log"
        columns = cut_table(folder / "losses.csv", ("step", "seconds", "learning_rate", *TERMS, *of_sources.columns, "skipped"), step)
        cut_table(folder / "validation.csv", ("step", "set", "images", "psnr_in", "ssim_in", "psnr", "ssim"), step)

    # Report what will run:
    log(dump(options).rstrip())
    for line in resumed:
        log(line)
    for images, options_k, count, weight in zip(sources, options.sources, training_set.samples_per_epoch, lambdas.tolist()):
        log(f"source {images.name}: {images.describe()}; x {options_k.repeat} = {count} samples an epoch, lambda {weight:.4f}")
    for images in sets:
        log(f"validation {images.name}: {images.describe()}")
    ends = [first for first, _, _ in stages[1:]] + [steps]
    samples = sum((end - first) * batch * processes for (first, batch, _), end in zip(stages, ends))
    log(f"network {sum(p.numel() for p in net.parameters()):,} parameters, potentials "
        f"{sum(p.numel() for p in potentials.parameters()):,} (training only); {steps} steps, {samples:,} samples, "
        f"{samples / len(training_set):.1f} epochs, on {processes} x {device} in {options.precision}")

    groups = training_set.samples_per_epoch if options.balanced else [len(training_set)]         # drawn from in turn
    sampler = EpochSampler(groups, stages, steps, options.seed, 0 if flags.dry_run else step, rank, processes)
    loader = DataLoader(training_set, batch_sampler=sampler, num_workers=0 if flags.dry_run else options.workers,
                        worker_init_fn=own_process_group, pin_memory=device.type == "cuda",
                        generator=torch.Generator())            # its own: starting a loader must not move the run's random state

    def take_step(batch: Batch, potentials_too: bool) -> None:
        terms, samples = map_step(net, potentials, moving, map_gradients, map_optimizer, batch, options.objective, options.precision,
                                  options.clip)
        if ema:
            ema.update_parameters(net)
        if potentials_too:
            terms |= potential_step(net, potentials, potential_gradients, potential_optimizer, batch, rho, options.precision)
        means.add(terms)
        of_sources.add(samples["cost"], samples["potential"], batch[2])
        skipped.add(*(terms[name] for name in ("gradient_norm", "potential_gradient_norm") if name in terms))

    # Steps whose loss or gradient was not finite: not applied; told when the losses are read; several in a row end the run.
    def read_skipped() -> int:
        numbers = skipped.read(step, options.skipped)
        if numbers:
            log(f"step {step}: {len(numbers)} not applied since the last reading, loss or gradient not finite: {first_few(map(str, numbers), 10)}")
        if len(skipped.in_a_row) >= options.skipped:
            if rank == 0:
                files = [(number, *training_set.files(index)) for number in skipped.in_a_row for index, _, _ in sampler.of_step(number - 1)]
                write_csv(folder / "not_finite.csv", [("step", "source", "degraded", "clean"), *files])
            last = next((path for path in (folder / "last.pth", folder / "previous.pth") if path.exists()), None)
            raise InputError(f"step {skipped.in_a_row[-1]}: loss or gradient not finite, {options.skipped} steps in a row; their files are in "
                             f"{folder / 'not_finite.csv'}, {f'the last good checkpoint is {last}' if last else 'no checkpoint yet'}")
        return len(numbers)

    if flags.dry_run:
        take_step(to_device(next(iter(loader))), potentials_too=True)
        if skipped.read(1, limit=2):
            raise InputError(f"{options.file}: one step: loss or gradient not finite")
        log("one step: " + ", ".join(f"{name} {value:.4g}" for name, value in means.report().items()))
        return

    def offered() -> dict:
        weights = {name: tensor.contiguous() for name, tensor in deployed.state_dict().items()}
        return {"net": weights, "network": dataclasses.asdict(options.network), "step": step}

    def save() -> None:
        if rank == 0:
            save_checkpoint(folder / "last.pth", previous=folder / "previous.pth", content={
                **offered(),
                "train": {
                    "net": net.state_dict(), "potentials": potentials.state_dict(), "ema": ema.state_dict() if ema else None,
                    "map_optimizer": map_optimizer.state_dict(), "potential_optimizer": potential_optimizer.state_dict(),
                    "best": best, "options": {**dataclasses.asdict(options), **more_facts},
                    "random": torch.get_rng_state(),
                    "random_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
                },
            })

    def validate() -> None:
        nonlocal best
        rows = evaluate(deployed, sets, options.validation.protocol) if rank == 0 else []
        rows += [average] if (average := average_row(rows)) else []
        for row in rows:
            if row.scores:
                log(f"step {step} {row.set}: {row.scores['psnr']:.2f} dB / {row.scores['ssim']:.4f} ({row.images} images)")
            append_row(folder / "validation.csv", (step, row.set, row.images, *row.values(("psnr", "ssim"))))
        if rows and rows[-1].set == "average" and rows[-1].scores["psnr"] > best:
            best = rows[-1].scores["psnr"]
            save_checkpoint(folder / "best.pth", offered())

    # Train: the alternation, batch by batch.
    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stop.append(signal.Signals(number)))
    seconds = time.monotonic()
    with (tqdm(total=steps, initial=step, desc=options.name, dynamic_ncols=True, disable=rank > 0) as bar,
          distributed.naming_dead_processes(training_set.reading.of)):
        for batch in loader:
            factor = learning_rate_factor(options, step, steps, steps_per_epoch)
            for optimizer, rate in ((map_optimizer, options.learning_rate), (potential_optimizer, options.potential_learning_rate)):
                for group in optimizer.param_groups:
                    group["lr"] = rate * factor

            step += 1
            take_step(to_device(batch), potentials_too=step % options.map_steps == 0 and options.moves != ["decoder"])
            if options.gap.every and step % options.gap.every == 0:
                means.add({"inner_gap": measure_gap(*stages[0][1:], options.learning_rate * factor)})
            bar.update()
            reading = step % options.log_every == 0 or step == steps        # nothing waits for the device between two readings
            if reading:
                values = {**dict.fromkeys(TERMS, math.nan), **means.report(), **of_sources.report(), "skipped": read_skipped()}
                bar.set_postfix({name: f"{values[name]:.3g}" for name in ("map_loss", "reconstruction", "dual", "potential_loss")})
                if rank == 0:
                    append_text(log_file, f"step {step} " + " ".join(f"{name} {value:.4g}" for name, value in values.items()) + "\n")
                    row = {"step": step, "seconds": f"{time.monotonic() - seconds:.1f}", "learning_rate": f"{options.learning_rate * factor:.3g}",
                           **{name: f"{value:.6g}" for name, value in values.items()}}
                    append_row(folder / "losses.csv", [row.get(name, "nan") for name in columns])
            if sets and (step % options.validation.every == 0 or step == steps):
                validate()
            stopping = bool(stop)
            if processes > 1:                                               # all of them have to stop at the same step
                stopping = (reading or device.type == "cpu") and distributed.average_(torch.tensor(float(stopping), device=device)).item() > 0
            if step % options.save_every == 0 or step == steps or stopping:
                save()
            if stopping and step < steps:
                number = stop[0] if stop else signal.SIGTERM                    # another process got it
                raise InputError(f"stopped by {number.name} at step {step} of {steps}: saved, continue with --resume", status=128 + number)
    distributed.shutdown()
    log(f"done: {step} steps, weights in {folder / 'last.pth'}" + (f" and {folder / 'best.pth'} (best {best:.2f} dB)" if best > -math.inf else ""))


if __name__ == "__main__":
    with one_line_errors():
        main()
