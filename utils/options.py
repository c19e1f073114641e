"""Options of train.py and test.py: names, types, ranges, defaults (mostly the paper's), and reader.

An option file is nested YAML. An unknown key, a wrong type or a value out of range is an InputError that
names the file and the key.
"""

import contextlib
import dataclasses
import inspect
import math
import os
import re
import reprlib
import types
import typing
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml

from utils.errors import InputError, did_you_mean, naming, one_line

T = TypeVar("T")
AIRLIGHT = [0.7, 1.0]
NUMBER = re.compile(r"-?(0|[1-9]\d*)?(\.\d*)?([eE][-+]?\d+)?")     # no leading zeros, inf, nan, 1:30


# Ranges: a condition, and what an error says was expected.
Positive = Annotated[T, lambda number: 0 < number < math.inf, "a number above 0"]
NotNegative = Annotated[T, lambda number: number >= 0, "0 or more"]
Share = Annotated[float, lambda share: 0 <= share < 1, "a share from 0 to below 1"]
Range = Annotated[list[float], lambda ends: not ends or len(ends) == 2 and 0 <= ends[0] <= ends[1],
                  "[low, high], from 0"]
Airlight = Annotated[list[float], lambda ends: len(ends) == 2 and 0 <= ends[0] <= ends[1] <= 1,
                     "[low, high], from 0 to 1"]
Two = Annotated[list[NotNegative[T]], lambda numbers: len(numbers) == 2, "two numbers"]
Stage = Annotated[list[Positive[int]], lambda stage: len(stage) == 3, "[from step, batch, patch]"]
FolderName = Annotated[str, re.compile("[^./][^/]*").fullmatch, "a name that can be a folder"]
Metrics = Annotated[list[Literal["psnr", "ssim", "psnr_y", "ssim_y", "lpips"]],
                    lambda names: names and len({*names}) == len(names), "one or more, each once"]


def require(condition: Any, message: str) -> None:
    """InputError with the message unless the condition holds."""
    if not condition:
        raise InputError(message)


@dataclass
class Network:
    """Arguments of models.baryir.BaryIR."""

    width: Positive[int] = 48
    encoder_blocks: list[NotNegative[int]] = field(default_factory=lambda: [4, 6, 6])
    latent_blocks: NotNegative[int] = 8
    transport_blocks: Positive[int] = 8
    decoder_blocks: list[NotNegative[int]] = field(default_factory=lambda: [4, 6, 6])
    residual_blocks: list[NotNegative[int]] = field(default_factory=lambda: [6, 6])
    refinement_blocks: NotNegative[int] = 4
    heads: list[Positive[int]] = field(default_factory=lambda: [1, 2, 4, 8])
    expansion: Positive[float] = 2.66
    backbone: str = "restormer"                             # a name of models.baryir.BACKBONES
    barycenter: bool = True                                 # false: the plain backbone
    branch_init: NotNegative[float] = 1.0                   # small: blocks begin as identities


@dataclass(kw_only=True)
class Images:
    """A training source or a test set; relative folders are below `root`."""

    name: FolderName
    degraded: str | list[str] = ""                          # a folder; of a list, the first that exists
    clean: str | list[str] = ""
    holdout: list[str] = field(default_factory=list)        # name patterns that sources lack, test sets keep
    expected: NotNegative[int] = 0                          # images of the complete set; 0 = not said
    bundled: list[str] = field(default_factory=list)        # photographs of scikit-image, instead of folders
    pairing: Literal["auto", "same", "rain", "haze", "o_haze", "spa"] = "auto"
    # Made on the fly from the clean images, or on top of the degraded ones (mixed degradations), if any:
    degradation: Literal["", "noise", "camera", "poisson", "rain", "haze", "underwater", "blur", "defocus",
                         "gaussian_blur", "lowlight", "jpeg", "jpeg_444", "clean"] = ""
    # Strengths, or the ends [low, high] of their range. noise: sigma of 255; camera: stops of gain; rain:
    # layers; haze: beta; blur: length of the camera's path, defocus: radius, gaussian_blur: sigma, in pixels;
    # lowlight: stops; jpeg: quality; poisson: photons; underwater: a factor (data/degradations.py).
    levels: list[Positive[float]] = field(default_factory=list)
    range: Range = field(default_factory=list)
    layers: str = ""                                        # of rain: a folder, else they are drawn
    holdout_layers: list[str] = field(default_factory=list)     # of layers, as holdout of images
    depth: str = ""                                         # of haze: a folder, files named as clean ones
    airlight: Airlight = field(default_factory=AIRLIGHT.copy)               # of haze: ends of A

    def __post_init__(self) -> None:
        require(not (self.bundled and (self.degraded or self.clean)),
                "bundled: given beside a folder, expected one of them")
        require(not (self.levels and self.range), "range: given beside levels, expected one of them")
        kind, strengths = self.degradation, self.levels or self.range
        require(kind or not strengths, "degradation: none given for levels or a range")
        require(strengths or kind in ("", "clean"), f"levels: none given for degradation {kind}, "
                                                    "expected for example [15, 25, 50], or a range")
        require(kind[:4] != "jpeg" or all(1 <= quality <= 100 for quality in strengths),
                f"{'levels' if self.levels else 'range'}: {shown(strengths)}, expected qualities of JPEG "
                "from 1 to 100")
        parts = ("layers", "rain", ""), ("depth", "haze", ""), ("airlight", "haze", AIRLIGHT)
        for name, owner, unset in parts:                                # else ignored in silence
            there = getattr(self, name) != unset
            require(kind == owner or not there, f"{name}: given without degradation {owner}")
        require(kind != "camera" or not self.degraded,
                "degradation: camera on top of a folder degraded, expected another one, or camera_share")


@dataclass(kw_only=True)
class Source(Images):
    """A training source, or, with others of the same name, a part of one: an index, lambda and potential."""

    repeat: Positive[int] = 1                               # times that each image is listed in an epoch

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.bundled and self.degradation or self.clean and (self.degraded or self.degradation),
                "clean: expected the folders degraded and clean, or a degradation of clean or bundled images")


@dataclass(kw_only=True)
class TestSet(Images):
    """A test set: with a degraded folder alone it has no ground truth; a degradation is seeded per file."""

    optional: bool = False                                  # left out, with a line, if its folder is absent
    average: bool = True                                    # counts in the average of the sets
    limit: NotNegative[int] = 0                             # first images only; 0 = all
    offset: Two[int] = field(default_factory=lambda: [0, 0])            # rows, columns cut off

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.degraded or self.bundled or self.clean and self.degradation,
                "degraded: expected a folder degraded, a degradation of clean images, or bundled images")
        require(len(self.levels) <= 1, f"levels: {len(self.levels)} levels, expected one in a test set")


TestSets = Annotated[list[TestSet], lambda sets: len({one.name for one in sets}) == len(sets),
                     "a different name for each"]


@dataclass
class Objective:
    w_rec: Positive[float] = 1e4
    # The paper's is root_mean_square, with which exactly congruent potentials run away (RESULTS.md).
    cost: Literal["mean_square", "root_mean_square"] = "mean_square"
    gamma: NotNegative[float] = 0.05                        # 0.02 in the release's distributed runs
    lambdas: Literal["inverse", "uniform"] | list[float] = "inverse"
    penalty: NotNegative[float] = 0.0                       # rho; 0: congruent by construction; release: 10
    # Weight of the low band at the run's first and last step. [0, 0]: one band, plain L1.
    low_weight: Two[float] = field(default_factory=lambda: [0.0, 0.0])


@dataclass
class Validation:
    every: Positive[int] = 5000                             # steps
    sets: TestSets = field(default_factory=list)       # measured under protocol promptir


@dataclass(kw_only=True)
class Options:
    """What train.py and test.py share."""

    name: FolderName
    root: str = "datasets"
    # bfloat16: autocast; auto: where the device computes it natively; none given: float32, photographs auto.
    precision: Literal["", "auto", "float32", "bfloat16"] = ""
    output: str = ""                                        # results go to output/name
    file = ""                                               # no option: where they were read from


@dataclass(kw_only=True)
class TrainOptions(Options):
    sources: Annotated[list[Source], len, "at least one source"]
    seed: NotNegative[int] = 0
    recompute: bool = False                                 # activation checkpointing: time for memory
    network: Network = field(default_factory=Network)
    pretrained: str = ""                                    # checkpoint whose weights a new run starts from
    objective: Objective = field(default_factory=Objective)
    # joint: encoder, T and decoder descend one loss (the paper). separate: T by the transport alone, in
    # standardised latents, `map_steps` times a batch; encoder and decoder by the reconstruction alone.
    # reconstruction: all of the network by the reconstruction, no transport.
    scheme: Literal["joint", "separate", "reconstruction"] = "joint"
    epochs: NotNegative[float] = 0                          # epochs or steps, not both
    steps: NotNegative[int] = 0
    batch: Positive[int] = 3                                # per process
    balanced: bool = False                                  # all sources equally in a batch, not by repeat
    patch: Positive[int] = 128
    progressive: list[Stage] = field(default_factory=list)  # [[from step, batch, patch], ...] (Restormer)
    clean_share: Share = 0.0                                # share of each source's samples with clean input
    # Share of the degraded inputs, but those of degradation noise or camera, that get a camera's noise, too.
    camera_share: Share = 0.0
    optimizer: Literal["rmsprop", "adamw"] = "rmsprop"      # adamw: without weight decay
    learning_rate: Positive[float] = 1e-4
    potential_learning_rate: Positive[float] = 1e-4
    transport_learning_rate: Positive[float] = 1e-3         # of T in scheme separate
    schedule: Literal["cosine", "constant"] | Positive[float] = 50.0    # epochs after each of which x 0.1
    warmup: NotNegative[int] = 0                            # steps of linear warm-up
    map_steps: Positive[int] = 1                            # separate: steps of T per batch
    clip: NotNegative[float] = 0.0                          # largest gradient norm of the network; 0 = none
    ema: Share = 0.0                                        # largest decay of the averaged weights; 0 = none
    workers: NotNegative[int] = 4
    cache: bool = False                                     # decode all images first, into memory
    log_every: Positive[int] = 50                           # steps
    save_every: Positive[int] = 1000
    validation: Validation = field(default_factory=Validation)

    def __post_init__(self) -> None:
        self.output = self.output or "experiments"
        require(bool(self.epochs) != bool(self.steps),
                f"steps: {self.steps} with epochs: {self.epochs:g}, expected exactly one of them")
        require(self.scheme != "joint" or self.map_steps == 1,
                f"map_steps: {self.map_steps} with scheme joint, expected 1")
        require(self.network.barycenter or self.scheme == "reconstruction",
                f"scheme: {self.scheme} with network.barycenter: false, expected reconstruction")
        require(all(start < self.steps for start, _, _ in self.progressive),
                "progressive: expected with steps, not epochs, and all its stages to begin below steps")
        names = {source.name for source in self.sources}
        batches = [self.batch, *(batch for _, batch, _ in self.progressive)]
        require(not self.balanced or not any(batch % len(names) for batch in batches),
                f"balanced: batches of {batches}, expected multiples of {len(names)}, one for each source")


@dataclass(kw_only=True)
class TestOptions(Options):
    checkpoint: str
    sets: TestSets
    # promptir, baryir: as published tables; full: whole images, with a border of their reflection.
    protocol: Literal["promptir", "baryir", "full"] = "promptir"
    strip: Literal["auto"] | NotNegative[int] = "auto"      # rows computed at a time: bounds memory; 0: all
    metrics: Metrics = field(default_factory=lambda: ["psnr", "ssim"])
    published: str = ""                                     # table of benchmarks/published.yml, beside ours
    save: bool = True                                       # write the restored images, and a page with them
    keep_tones: bool = False                                # photographs keep brightness, colour and haze

    def __post_init__(self) -> None:
        self.output = self.output or "results"
        shipped = os.path.join(Path(__file__).parent.parent, self.checkpoint)       # from any folder
        if not os.path.exists(self.checkpoint) and os.path.isfile(shipped):
            self.checkpoint = shipped


# Reading.


def option_parser(text: str) -> ArgumentParser:
    """A parser of --opt FILE and --set KEY=VALUE ..., for load_options; text: what --help says."""
    layout = RawDescriptionHelpFormatter
    parser = ArgumentParser(description=text, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("--opt", required=True, metavar="FILE", help="option file")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="options, keys dotted")
    return parser


def load_options(kind: type[T], path: str, overrides: list[str] = ()) -> T:
    """Read an option file of train.py or test.py (kind: TrainOptions or TestOptions).

    overrides: `key=value`, keys dotted, list entries by number.
    """
    content = read_file(path)
    with naming(path):
        for change in overrides:
            with naming(f"--set {change}"):
                override(content, change)
        options = parse(kind, content, "")
    options.file = path
    return options


def read_file(path: str, above: tuple[str, ...] = ()) -> dict:
    """The content of an option file. `base: FILE`, beside it, gives what it does not say.

    above: the files whose base this one is.
    """
    with naming(path):
        try:
            content = read_yaml(Path(path).read_bytes())
        except OSError as error:
            raise InputError(error.strerror.lower()) from None
        require(isinstance(content, dict), f"{shown(content)}, expected keys and values")
        if "base" not in content:
            return content
        base, above = str(content.pop("base")), (*above, os.path.realpath(path))
        beside = str(Path(path).parent / base)
        require(os.path.realpath(beside) not in above, f"base: {base}, expected the name of another file")
        return merged(read_file(beside, above), content)


def merged(base: Any, changes: Any) -> Any:
    """Nested mappings of options, the changes over the base."""
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    return {**base, **{key: merged(base.get(key), value) for key, value in changes.items()}}


class TextLoader(yaml.BaseLoader):
    """Scalars stay text until their option's type is known: no is a name, 010 not 8. A key comes once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise yaml.MarkedYAMLError(problem="a key is given twice", problem_mark=node.start_mark)
        return mapping


def read_yaml(text: bytes | str) -> Any:
    try:
        return yaml.load(text, TextLoader)
    except (yaml.YAMLError, RecursionError) as error:
        encoding = " in UTF-8 or UTF-16" * isinstance(error, yaml.reader.ReaderError)
        raise InputError(f"not valid YAML{encoding}: {one_line(error)}") from None


def override(content: dict, change: str) -> None:
    """Apply one `key=value` to the content of an option file."""
    key, equals, text = change.partition("=")
    require(key and equals, "expected key=value")
    value = read_yaml(text) if text[:1] in ("[", "{") else text
    *parents, last = key.replace("[", ".").replace("]", "").split(".")
    here: Any = content
    try:
        for part in parents:
            here = here[int(part)] if isinstance(here, list) else here.setdefault(part, {})
        here[int(last) if isinstance(here, list) else last] = value
    except (ValueError, IndexError, AttributeError, TypeError):
        raise InputError("no such entry") from None


def parse(kind: Any, value: Any, where: str) -> Any:
    """Convert plain YAML data to the type `kind`; `where` ("file.yml: network.") opens the error messages."""
    origin, arguments, place = typing.get_origin(kind), typing.get_args(kind), where.rstrip(". :")
    found = f"{place}: {shown(value)}"
    if origin is Annotated:
        plain, holds, expected = arguments
        value = parse(plain, value, where)
        require(holds(value), f"{found}, expected {expected}")
        return value
    if origin in (types.UnionType, typing.Union):           # the choice between a word and something else
        is_word = isinstance(value, str) and (arguments[0] is str or not NUMBER.fullmatch(value))
        return parse(arguments[not is_word], value, where)
    if dataclasses.is_dataclass(kind):
        require(isinstance(value, dict), f"{found}, expected keys and values")
        return parse_options(kind, value, where)
    if origin is list:
        require(isinstance(value, list), f"{found}, expected a list")
        return [parse(arguments[0], entry, f"{place}[{i}].") for i, entry in enumerate(value)]
    if origin is Literal:
        if value not in arguments:
            choices = ", ".join(filter(None, arguments))
            raise InputError(f"{found}, expected one of {choices}{did_you_mean(str(value), arguments)}")
        return value
    if kind is bool and isinstance(value, str):
        value = {"true": True, "false": False}.get(value, value)
    elif isinstance(value, str) and NUMBER.fullmatch(value) or kind is float and type(value) is int:
        with contextlib.suppress(ValueError, OverflowError):
            value = kind(value)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    require(type(value) is kind, f"{found}, expected {names[kind]}")
    return value


def parse_options(kind: type[T], content: dict, where: str) -> T:
    """The dataclass `kind` of a mapping without unknown or missing keys."""
    known = inspect.signature(kind).parameters
    for key in content:
        if key not in known:
            raise InputError(f"{where}{str(key)[:80]}: unknown option{did_you_mean(str(key), known)}")
    for key, parameter in known.items():
        require(key in content or parameter.default is not parameter.empty, f"{where}{key}: missing")
    values = {key: parse(known[key].annotation, value, f"{where}{key}.") for key, value in content.items()}
    try:
        return kind(**values)
    except InputError as error:
        raise InputError(f"{where}{error}") from None


def dump(options: Any) -> str:
    """Resolved options as YAML that load_options reads."""
    return yaml.safe_dump(dataclasses.asdict(options), sort_keys=False, default_flow_style=None, width=120)


def shown(value: Any) -> str:
    """A value of an option file for an error's line: the start of what is long or nested."""
    return reprlib.repr(value)[:100]
