"""The options of train.py and test.py, their values' ranges, and their defaults: the paper's or the release's."""

from dataclasses import dataclass, field
from typing import Any, Literal

from utils.errors import InputError
from utils.option_files import load_options, read_yaml, shown


@dataclass
class Network:
    """Arguments of models.baryir.BaryIR."""

    width: int = 48
    encoder_blocks: list[int] = field(default_factory=lambda: [4, 6, 6])
    latent_blocks: int = 8
    transport_blocks: int = 8
    decoder_blocks: list[int] = field(default_factory=lambda: [4, 6, 6])
    residual_blocks: list[int] = field(default_factory=lambda: [6, 6])
    refinement_blocks: int = 4
    heads: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    bridge_heads: int = 4
    expansion: float = 2.66
    residual_scale: float = 0.8

    def check(self) -> None:
        positive(self, "width", "transport_blocks", "bridge_heads", "expansion")
        not_negative(self, "latent_blocks", "refinement_blocks")
        for name, least in (("encoder_blocks", 0), ("decoder_blocks", 0), ("residual_blocks", 0), ("heads", 1)):
            if any(value < least for value in getattr(self, name)):
                raise InputError(f"{name}: {getattr(self, name)}, expected numbers from {least} on")


@dataclass
class Images:
    """A training source or a test set; relative folders are below `root`."""

    name: str = ""
    type: Literal["", "denoise", "derain", "dehaze", "deblur", "lowlight", "single"] = ""   # gives default folders
    degraded: str | list[str] = ""                          # a folder; of a list, the first that exists
    clean: str | list[str] = ""
    file_list: str = ""                                     # text file below root that names the files to use, one a line
    expected: int = 0                                       # images of the complete set; 0 = not said
    bundled: list[str] = field(default_factory=list)        # photographs that scikit-image ships, instead of folders
    outside_root: bool = False                              # its folders, and links in them, may lead out of root
    pairing: Literal["auto", "same", "rain", "haze", "o_haze", "spa"] = "auto"
    # Made on the fly from the clean images, or on top of the degraded ones (mixed degradations) where there are any:
    degradation: Literal["", "noise", "rain", "haze", "blur", "lowlight"] = ""
    levels: list[float] = field(default_factory=list)       # its strengths; noise: sigma on the 0-255 scale

    def check(self) -> None:
        if self.type == "denoise" and not self.degradation:
            self.degradation = "noise"
        if self.degradation and not self.levels:
            raise InputError(f"levels: none given for degradation {self.degradation}, expected for example [15, 25, 50]")
        if any(level <= 0 for level in self.levels):
            raise InputError(f"levels: {shown(self.levels)}, expected numbers above 0")
        if self.levels and not self.degradation:
            raise InputError("levels: given without a degradation")
        if self.bundled and (self.degraded or self.clean or self.file_list):
            raise InputError("bundled: given beside a folder or a file list, expected one of them")
        not_negative(self, "expected")
        self.name = self.name or self.type


@dataclass
class Source(Images):
    """A training source."""

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


@dataclass
class TestSet(Images):
    """A test set: with a degraded folder alone it has no ground truth; a degradation has one level, seeded per file."""

    optional: bool = False                                  # left out, with a line, where its folder is absent
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
    cost: Literal["root_mean_square", "mean_square", "euclidean", "quadratic"] = "root_mean_square"     # of losses.barycenter
    gamma: float = 0.05                                     # 0.02 in the release's distributed runs
    tau: float = 0.07
    lambdas: Literal["inverse", "uniform"] | list[float] = "inverse"

    def check(self) -> None:
        positive(self, "tau")
        not_negative(self, "w_rec", "gamma")


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


@dataclass
class Validation:
    every: int = 5000                                       # steps
    protocol: Literal["promptir", "baryir", "full"] = "promptir"
    sets: list[TestSet] = field(default_factory=list)

    def check(self) -> None:
        positive(self, "every")


@dataclass
class Gap:
    """utils.instruments.inner_gap: an estimate of the dual's inner gap in losses.csv."""

    every: int = 0                                          # steps between estimates; 0 = none
    steps: int = 10                                         # map steps of the copy, and batches on which it is measured

    def check(self) -> None:
        not_negative(self, "every")
        positive(self, "steps")


@dataclass
class TrainOptions:
    name: str
    sources: list[Source]
    root: str = "datasets"
    outside_root: bool = False                              # folders, and links in them, may lead out of root
    output: str = "experiments"                             # the run's folder is output/name
    seed: int = 0
    device: str = "auto"                                    # auto, cpu, cuda or cuda:N
    precision: Literal["float32", "bfloat16"] = "float32"   # bfloat16: autocast; fast on CUDA and on CPUs with AVX-512 BF16
    channels_last: bool = True
    compile: bool = False                                   # torch.compile of the three stages
    # What the backward pass computes again instead of keeping it: cheap: a block but for its dearest products; all: every block
    recompute: Literal["none", "cheap", "all"] = "none"
    network: Network = field(default_factory=Network)
    pretrained: str = ""                                    # checkpoint whose weights a new run starts from
    # Stages that the map step moves. T alone, with w_rec: 0: the barycenter of given sources P_k. The decoder alone: for a given T.
    moves: list[Literal["encoder", "transport_map", "decoder"]] = field(default_factory=lambda: ["encoder", "transport_map", "decoder"])
    potentials: Potentials = field(default_factory=Potentials)
    objective: Objective = field(default_factory=Objective)
    epochs: float = 0                                       # epochs or steps, not both
    steps: int = 0
    batch: int = 3                                          # per process
    balanced: bool = False                                  # every batch holds all sources equally, whatever their repeats
    patch: int = 128
    progressive: list[list[int]] = field(default_factory=list)     # [[from step, batch, patch], ...], Restormer sec. 4
    optimizer: Literal["rmsprop", "adam", "adamw"] = "rmsprop"
    learning_rate: float = 1e-4
    potential_learning_rate: float = 1e-4
    weight_decay: float = 0.0
    schedule: Schedule = field(default_factory=Schedule)
    map_steps: int = 1                                      # map steps per potential step
    clip: float = 0.0                                       # largest gradient norm of a map step; 0 = no clipping
    ema: float = 0.0                                        # decay of the averaged weights; 0 = none
    workers: int = 4
    cache: bool = False                                     # decode all images first, into a file that all workers map
    skipped: int = 10                                       # steps in a row with a loss or gradient that is not finite, which end the run
    log_every: int = 50                                     # steps
    save_every: int = 1000
    gap: Gap = field(default_factory=Gap)
    validation: Validation = field(default_factory=Validation)
    file: str = ""                                          # the option file, filled in when it is read

    def check(self) -> None:
        folder_name(self)
        for images in self.sources + self.validation.sets:
            images.outside_root |= self.outside_root
        not_negative(self, "epochs", "steps", "seed", "weight_decay", "clip", "workers")
        if bool(self.epochs) == bool(self.steps):
            raise InputError(f"steps: {self.steps} with epochs: {self.epochs:g}, expected exactly one of them")
        if not self.sources:
            raise InputError("sources: empty, expected at least one source")
        for key, entries in (("sources", self.sources), ("validation.sets", self.validation.sets)):
            names = [images.name for images in entries]
            if len(set(names)) < len(names) or "" in names:
                raise InputError(f"{key}: names {shown(names)}, expected a different name for each")
        for i, stage in enumerate(self.progressive):
            if len(stage) != 3 or min(stage) < 1:
                raise InputError(f"progressive[{i}]: {stage}, expected [from step, batch, patch]")
        if self.progressive and not (self.steps and [0] < sorted(self.progressive)[0] and sorted(self.progressive)[-1] < [self.steps]):
            raise InputError("progressive: expected with steps, not epochs, and all its stages to begin below steps")
        batches = [self.batch, *(stage[1] for stage in self.progressive)]
        if not self.moves or len(set(self.moves)) < len(self.moves):
            raise InputError(f"moves: {shown(self.moves)}, expected one or more of encoder, transport_map, decoder, each once")
        if len(self.moves) < 3 and not self.pretrained:
            raise InputError(f"moves: {', '.join(self.moves)} without pretrained, expected a checkpoint that gives the other stages")
        if "decoder" in self.moves and not self.objective.w_rec:
            raise InputError("objective.w_rec: 0 but moves has the decoder, which nothing else trains")
        if self.balanced and any(batch % len(self.sources) for batch in batches):
            raise InputError(f"balanced: batches of {batches} with {len(self.sources)} sources, expected multiples of {len(self.sources)}")
        positive(self, "batch", "patch", "learning_rate", "potential_learning_rate", "map_steps", "skipped", "log_every", "save_every")
        if not 0 <= self.ema < 1:
            raise InputError(f"ema: {self.ema}, expected 0 (none) or a decay below 1")


@dataclass
class TestOptions:
    name: str
    checkpoint: str
    sets: list[TestSet]
    root: str = "datasets"
    outside_root: bool = False                              # folders, and links in them, may lead out of root
    output: str = "results"                                 # images and tables go to output/name
    device: str = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    protocol: Literal["promptir", "baryir", "full"] = "promptir"
    # Rows of an image that are computed at a time, which bounds the memory, not the result: 0 = all; auto: utils.evaluation.strip_rows
    strip: Literal["auto"] | int = "auto"
    compile: bool = False                                   # torch.compile, for images of any size; whole images, not in strips
    metrics: list[Literal["psnr", "ssim", "lpips", "fid"]] = field(default_factory=lambda: ["psnr", "ssim"])
    published: str = ""                                     # table of benchmarks/published.yml to print beside ours
    save: bool = True                                       # write the restored images
    side_by_side: bool = False                              # and, in one picture, input | restored (| ground truth)
    file: str = ""

    def check(self) -> None:
        folder_name(self)
        for images in self.sets:
            images.outside_root |= self.outside_root
        names = [images.name for images in self.sets]
        if len(set(names)) < len(names):
            raise InputError(f"sets: names {shown(names)}, expected a different name for each")
        if not self.metrics or len(set(self.metrics)) < len(self.metrics):
            raise InputError(f"metrics: {shown(self.metrics)}, expected one or more of psnr, ssim, lpips, fid, each once")
        if self.compile and self.strip not in ("auto", 0):
            raise InputError(f"strip: {self.strip} with compile, which computes whole images, expected auto or 0")
        if self.strip != "auto":
            not_negative(self, "strip")


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
    if not options.name or "/" in options.name or options.name.startswith(".") or len(options.name.encode()) > 200:
        raise InputError(f"name: {shown(options.name)}, expected a name that can be a folder")


def load_any(path: str, overrides: list[str] = ()) -> TrainOptions | TestOptions:
    """load_options for a file of train.py, which has sources, or of test.py."""
    return load_options(TrainOptions if "sources" in read_yaml(path) else TestOptions, path, overrides)
