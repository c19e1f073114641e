"""Options of train.py and test.py: names, types, ranges, defaults (the paper's or the release's), and reader.

An option file is nested YAML. An unknown key, a wrong type or a value out of range is an InputError that
names the file and the key.
"""

import dataclasses
import difflib
import inspect
import math
import reprlib
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from models.baryir import BaryIR
from utils.errors import InputError

T = TypeVar("T")


def positive(options: Any, *names: str) -> None:
    """InputError unless the named options are above 0."""
    for name in names:
        if not getattr(options, name) > 0:
            raise InputError(f"{name}: {getattr(options, name)}, expected a number above 0")


def not_negative(options: Any, *names: str) -> None:
    """InputError unless the named options are 0 or more."""
    for name in names:
        if not getattr(options, name) >= 0:
            raise InputError(f"{name}: {getattr(options, name)}, expected 0 or more")


def folder_name(options: Any) -> None:
    """InputError unless the name can be that of one new folder."""
    name = options.name
    if not name or "/" in name or name.startswith(".") or len(name.encode()) > 200:
        raise InputError(f"name: {shown(name)}, expected a name that can be a folder")


def check_network(network: Any) -> None:
    positive(network, "width", "transport_blocks", "bridge_heads", "expansion")
    not_negative(network, "latent_blocks", "refinement_blocks")
    for name, least in (("encoder_blocks", 0), ("decoder_blocks", 0), ("residual_blocks", 0), ("heads", 1)):
        if any(value < least for value in getattr(network, name)):
            raise InputError(f"{name}: {getattr(network, name)}, expected numbers from {least} on")


def arguments_of(model: type, check: Callable[[Any], None]) -> type:
    """A dataclass of a model's arguments with their defaults, so that an option file can set each."""
    entries = []
    for name, argument in inspect.signature(model).parameters.items():
        default = argument.default
        if isinstance(default, tuple):
            entries.append((name, list[int], field(default_factory=lambda values=default: list(values))))
        else:
            entries.append((name, type(default), field(default=default)))
    return dataclasses.make_dataclass("Network", entries, namespace={"check": check})


Network = arguments_of(BaryIR, check_network)


@dataclass(kw_only=True)
class Images:
    """A training source or a test set; relative folders are below `root`."""

    name: str = ""
    type: Literal["", "denoise", "derain", "dehaze", "deblur", "lowlight", "single"] = ""   # default folders
    degraded: str | list[str] = ""                          # a folder; of a list, the first that exists
    clean: str | list[str] = ""
    file_list: str = ""                                     # text file below root: names of files, one a line
    holdout: list[str] = field(default_factory=list)        # name patterns that sources lack, test sets keep
    expected: int = 0                                       # images of the complete set; 0 = not said
    bundled: list[str] = field(default_factory=list)        # photographs of scikit-image, instead of folders
    pairing: Literal["auto", "same", "rain", "haze", "o_haze", "spa"] = "auto"
    # Made on the fly from the clean images, or on top of the degraded ones (mixed degradations), if any:
    degradation: Literal["", "noise", "rain", "haze", "blur", "defocus", "lowlight", "jpeg", "clean"] = ""
    levels: list[float] = field(default_factory=list)       # strengths; noise: sigma of 255, jpeg: quality
    # Or the ends [low, high] of its strength. noise: sigma; rain: layers; haze: beta; blur: length of the
    # camera's path, defocus: radius, in pixels; lowlight: stops; jpeg: quality (data/degradations.py).
    range: list[float] = field(default_factory=list)
    layers: str = ""                                        # rain by range: folder of layers, else drawn ones
    depth: str = ""                                         # haze by range: folder, files named as clean ones
    airlight: list[float] = field(default_factory=lambda: [0.7, 1.0])       # haze by range: ends of A

    def check(self) -> None:
        if self.type == "denoise" and not self.degradation:
            self.degradation = "noise"
        self.check_strength()
        if self.bundled and (self.degraded or self.clean or self.file_list):
            raise InputError("bundled: given beside a folder or a file list, expected one of them")
        not_negative(self, "expected")
        self.name = self.name or self.type

    def check_strength(self) -> None:
        kind = self.degradation
        if kind and not (self.levels or self.range or kind == "clean"):
            raise InputError(f"levels: none given for degradation {kind}, "
                             "expected for example [15, 25, 50], or a range")
        if self.levels and kind in ("", "clean", "defocus"):
            what = f"for degradation {kind}" if kind else "without a degradation"
            raise InputError(f"levels: given {what}" + ", expected a range" * (kind == "defocus"))
        if any(level <= 0 for level in self.levels):
            raise InputError(f"levels: {shown(self.levels)}, expected numbers above 0")
        if self.levels and self.range:
            raise InputError("range: given beside levels, expected one of them")
        for name, most in (("range", math.inf), ("airlight", 1)):
            ends = getattr(self, name)
            if (ends or name == "airlight") and not (len(ends) == 2 and 0 <= ends[0] <= ends[1] <= most):
                raise InputError(f"{name}: {shown(ends)}, expected two numbers [low, high] from 0"
                                 + (f" to {most}" if most < math.inf else " on"))
        if kind == "jpeg" and any(not 1 <= quality <= 100 for quality in self.levels + self.range):
            raise InputError(f"range: {shown(self.levels + self.range)}, "
                             "expected qualities of JPEG from 1 to 100")
        for name, owner in (("range", ""), ("layers", "rain"), ("depth", "haze")):
            if getattr(self, name) and (not kind or owner and not (kind == owner and self.range)):
                raise InputError(f"{name}: given without a degradation" + f" {owner} by range" * bool(owner))


@dataclass(kw_only=True)
class Source(Images):
    """A training source, or, with others of the same `source`, a part of one."""

    source: str = ""                                        # one index, lambda and potential; else the name
    repeat: int = 1                                         # times that each image is listed in an epoch

    def check(self) -> None:
        super().check()
        if not (self.type or self.bundled or (self.clean and (self.degraded or self.degradation))):
            raise InputError("expected a type, or the folders degraded and clean, or bundled images")
        if self.bundled and not self.degradation:
            raise InputError("degradation: none given for bundled images")
        if self.degraded and not self.clean:
            raise InputError(f"clean: none given beside the folder degraded ({self.degraded})")
        positive(self, "repeat")


@dataclass(kw_only=True)
class TestSet(Images):
    """A test set: with a degraded folder alone it has no ground truth; a degradation is seeded per file."""

    optional: bool = False                                  # left out, with a line, if its folder is absent
    limit: int = 0                                          # first images only; 0 = all

    def check(self) -> None:
        super().check()
        folder_name(self)
        if self.name == "average":
            raise InputError("name: average, expected another one: the table has a line of this name")
        not_negative(self, "limit")
        if not (self.degraded or self.clean or self.bundled):
            raise InputError("expected a folder degraded or clean, or bundled images")
        if self.clean and not (self.degraded or self.degradation):
            raise InputError("clean: given without a folder degraded or a degradation")
        if len(self.levels) > 1:
            raise InputError(f"levels: {len(self.levels)} levels, expected one in a test set")


@dataclass
class Potentials:
    """models.potentials.Potentials and how their congruence is imposed."""

    width: int = 64
    congruence: Literal["exact", "penalty"] = "exact"
    penalty: float = 10.0                                   # rho of the release, for congruence: penalty

    def check(self) -> None:
        positive(self, "width", "penalty")


@dataclass
class Objective:
    w_rec: float = 1e4
    # A name of losses.barycenter.COSTS:
    cost: Literal["root_mean_square", "mean_square", "euclidean", "quadratic"] = "root_mean_square"
    gamma: float = 0.05                                     # 0.02 in the release's distributed runs
    tau: float = 0.07
    lambdas: Literal["inverse", "uniform"] | list[float] = "inverse"

    def check(self) -> None:
        positive(self, "tau", "w_rec")
        not_negative(self, "gamma")


@dataclass
class Schedule:
    name: Literal["step", "cosine", "constant"] = "step"
    every: float = 50                                       # step: epochs between decays
    factor: float = 0.1                                     # step: of each decay
    minimum: float = 0.0                                    # cosine: final rate, as a share of the first
    warmup: int = 0                                         # steps of linear warm-up

    def check(self) -> None:
        positive(self, "every", "factor")
        not_negative(self, "minimum", "warmup")

    def factor_at(self, step: int, steps: int, steps_per_epoch: float) -> float:
        """Share of the first learning rate that holds at a step of a run of so many."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.name == "cosine":
            progress = (step - self.warmup) / max(1, steps - self.warmup)
            return self.minimum + (1 - self.minimum) * 0.5 * (1 + math.cos(math.pi * progress))
        return self.factor ** int(step / (self.every * steps_per_epoch)) if self.name == "step" else 1.0


@dataclass
class Validation:
    every: int = 5000                                       # steps
    sets: list[TestSet] = field(default_factory=list)       # measured under protocol promptir

    def check(self) -> None:
        positive(self, "every")


@dataclass(kw_only=True)
class Options:
    """What train.py and test.py share."""

    name: str
    root: str = "datasets"
    device: str = "auto"                                    # auto, cpu, cuda or cuda:N
    precision: Literal["float32", "bfloat16"] = "float32"   # bfloat16: autocast, for CUDA and AVX-512 BF16
    compile: bool = False                                   # torch.compile of the three stages
    file = ""                                               # the option file, filled in when it is read

    def check(self) -> None:
        folder_name(self)


@dataclass(kw_only=True)
class TrainOptions(Options):
    sources: list[Source]
    output: str = "experiments"                             # the run's folder is output/name
    seed: int = 0
    # What the backward pass computes again. cheap: a block but for its dearest products; all: every block.
    recompute: Literal["none", "cheap", "all"] = "none"
    network: Network = field(default_factory=Network)
    pretrained: str = ""                                    # checkpoint whose weights a new run starts from
    potentials: Potentials = field(default_factory=Potentials)
    objective: Objective = field(default_factory=Objective)
    # joint: encoder, T and decoder descend one loss (the paper). separate: T by the transport alone, in
    # standardised latents, `map_steps` times a batch; encoder and decoder by the reconstruction alone.
    scheme: Literal["joint", "separate"] = "joint"
    epochs: float = 0                                       # epochs or steps, not both
    steps: int = 0
    batch: int = 3                                          # per process
    balanced: bool = False                                  # all sources equally in a batch, not by repeat
    patch: int = 128
    progressive: list[list[int]] = field(default_factory=list)  # [[from step, batch, patch], ...] (Restormer)
    clean_share: float = 0.0                                # share of each source's samples with clean input
    optimizer: Literal["rmsprop", "adam", "adamw"] = "rmsprop"
    learning_rate: float = 1e-4
    potential_learning_rate: float = 1e-4
    transport_learning_rate: float = 1e-3                   # of T in scheme separate
    schedule: Schedule = field(default_factory=Schedule)
    map_steps: int = 1                                      # of T per potential step
    clip: float = 0.0                                       # largest gradient norm of the network; 0 = none
    ema: float = 0.0                                        # decay of the averaged weights; 0 = none
    workers: int = 4
    cache: bool = False                                     # decode all images first, into a mapped file
    log_every: int = 50                                     # steps
    save_every: int = 1000
    validation: Validation = field(default_factory=Validation)

    def check(self) -> None:
        super().check()
        not_negative(self, "epochs", "steps", "seed", "clip", "workers")
        positive(self, "batch", "patch", "learning_rate", "potential_learning_rate",
                 "transport_learning_rate", "map_steps", "log_every", "save_every")
        if bool(self.epochs) == bool(self.steps):
            raise InputError(f"steps: {self.steps} with epochs: {self.epochs:g}, "
                             "expected exactly one of them")
        for name, most in (("ema", "a decay"), ("clean_share", "a share")):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)}, expected 0 (none) or {most} below 1")
        self.check_names()
        self.check_batches()

    def check_names(self) -> None:
        if not self.sources:
            raise InputError("sources: empty, expected at least one source")
        shared = {images.source for images in self.sources if images.source}
        sources = [*(images.name for images in self.sources if not images.source), *shared]
        sets = [images.name for images in self.validation.sets]
        for key, names in (("sources", sources), ("validation.sets", sets)):
            if len(set(names)) < len(names) or "" in names:
                raise InputError(f"{key}: names {shown(names)}, expected a different name for each")

    def check_batches(self) -> None:
        for i, stage in enumerate(self.progressive):
            if len(stage) != 3 or min(stage) < 1:
                raise InputError(f"progressive[{i}]: {stage}, expected [from step, batch, patch]")
        if any(stage[0] >= self.steps for stage in self.progressive):
            raise InputError("progressive: expected with steps, not epochs, "
                             "and all its stages to begin below steps")
        batches = [self.batch, *(stage[1] for stage in self.progressive)]
        sources = len({images.source or images.name for images in self.sources})
        if self.balanced and any(batch % sources for batch in batches):
            raise InputError(f"balanced: batches of {batches} with {sources} sources, "
                             f"expected multiples of {sources}")


@dataclass(kw_only=True)
class TestOptions(Options):
    checkpoint: str
    sets: list[TestSet]
    output: str = "results"                                 # images and tables go to output/name
    protocol: Literal["promptir", "baryir", "full"] = "promptir"
    # Rows of an image computed at a time, which bounds the memory: 0 = all; auto: models/strips.py
    strip: Literal["auto"] | int = "auto"
    metrics: list[Literal["psnr", "ssim", "lpips", "fid"]] = field(default_factory=lambda: ["psnr", "ssim"])
    published: str = ""                                     # table of benchmarks/published.yml, beside ours
    save: bool = True                                       # write the restored images
    side_by_side: bool = False                              # and, in one, input | restored (| ground truth)

    def check(self) -> None:
        super().check()
        names = [images.name for images in self.sets]
        if len(set(names)) < len(names):
            raise InputError(f"sets: names {shown(names)}, expected a different name for each")
        if not self.metrics or len(set(self.metrics)) < len(self.metrics):
            raise InputError(f"metrics: {shown(self.metrics)}, "
                             "expected one or more of psnr, ssim, lpips, fid, each once")
        if self.compile and self.strip not in ("auto", 0):
            raise InputError(f"strip: {self.strip} with compile, which computes whole images, "
                             "expected auto or 0")
        if self.strip != "auto":
            not_negative(self, "strip")


# Reading.


def load_options(kind: type[T], path: str, overrides: list[str] = ()) -> T:
    """Read an option file, apply `key=value` overrides (dotted keys; list entries by number) and check it."""
    content = read_yaml(path)
    for override in overrides:
        _override(content, override)
    options = parse(kind, content, f"{path}: ")
    options.file = path
    return options


def load_any(path: str, overrides: list[str] = ()) -> TrainOptions | TestOptions:
    """load_options for a file of train.py, which has sources, or of test.py."""
    return load_options(TrainOptions if "sources" in read_yaml(path) else TestOptions, path, overrides)


class UniqueKeys(yaml.SafeLoader):
    """yaml.safe_load's loader, but a key given twice is an error: PyYAML would take the second in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1]:
            message = f"{twice[0][:80]} is given twice"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: str) -> dict:
    """An option file as plain keys and values, unchecked."""
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), UniqueKeys)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror.lower()}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:       # ValueError: dates as 2024-13-45
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(content, dict):
        found = "nothing" if content is None else shown(content)
        raise InputError(f"{path}: expected keys and values, found {found}")
    return content


def parse(kind: Any, value: Any, where: str) -> Any:
    """Convert plain YAML data to the type `kind`; `where` opens the error messages."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise InputError(f"{where.rstrip('. :')}: {shown(value)}, expected keys and values")
        hints = typing.get_type_hints(kind)
        for key in value:
            if key not in hints:
                raise InputError(f"{where}{str(key)[:80]}: unknown option{_nearest(key, hints)}")
        for entry in dataclasses.fields(kind):
            if entry.default is entry.default_factory is dataclasses.MISSING and entry.name not in value:
                raise InputError(f"{where}{entry.name}: missing")
        result = kind(**{key: parse(hints[key], entry, f"{where}{key}.") for key, entry in value.items()})
        if hasattr(result, "check"):
            try:
                result.check()
            except InputError as error:
                whole = str(error).startswith("expected")       # not about one of its keys
                raise InputError(f"{where.rstrip('. :')}: {error}" if whole else f"{where}{error}") from None
        return result
    where = where.rstrip(".")
    if origin is list:
        if not isinstance(value, list):
            raise InputError(f"{where}: {shown(value)}, expected a list")
        return [parse(arguments[0], entry, f"{where}[{i}].") for i, entry in enumerate(value)]
    if origin is Literal:
        if not isinstance(value, (str, int)) or value not in arguments:
            choices = ", ".join(str(choice) for choice in arguments if choice != "")
            near = _nearest(value, arguments)
            raise InputError(f"{where}: {shown(value)}, expected one of {choices}{near}")
        return value
    if origin in (types.UnionType, typing.Union):           # the choice between a word and something else
        return parse(arguments[not isinstance(value, str)], value, f"{where}.")
    if kind is float and isinstance(value, str):            # PyYAML reads 2e-4 as a string
        try:
            value = float(value)
        except ValueError:
            pass
    if kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not kind:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise InputError(f"{where}: {shown(value)}, expected {names[kind]}")
    if kind is int and abs(value) >= 2**53:
        raise InputError(f"{where}: a number of {value.bit_length()} bits, expected one below 2^53")
    if kind is str and not value.isprintable():
        raise InputError(f"{where}: {shown(value)}, expected printable characters only")
    if kind is float and not math.isfinite(value):
        raise InputError(f"{where}: {value}, expected a finite number")
    return value


def dump(options: Any) -> str:
    """Resolved options as YAML that load_options reads."""
    return yaml.safe_dump(dataclasses.asdict(options), sort_keys=False, default_flow_style=None, width=120)


def _nearest(key: Any, known: Any) -> str:
    near = difflib.get_close_matches(str(key), [str(k) for k in known], n=1)
    return f", did you mean {near[0]}?" if near else ""


def _override(content: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {override}: expected key=value")
    try:
        value = yaml.safe_load(text) if text else ""
    except (yaml.YAMLError, ValueError, RecursionError):
        value = text
    *parents, last = key.replace("[", ".").replace("]", "").split(".")
    here: Any = content
    for i, part in enumerate([*parents, last]):
        if isinstance(here, list):
            if not part.isdecimal() or int(part) >= len(here):
                raise InputError(f"--set {override}: no entry {part} in {'.'.join(parents[:i])}, "
                                 f"which has {len(here)}")
            part = int(part)
        elif not isinstance(here, dict):
            raise InputError(f"--set {override}: {'.'.join(parents[:i])} has no options of its own")
        if i == len(parents):
            here[part] = value
        elif isinstance(here, dict):
            here = here.setdefault(part, {})
        else:
            here = here[part]


def shown(value: Any) -> str:
    """A value of an option file for an error's line: the start of what is long or nested."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80
