"""Every option, once: a frozen dataclass field and its comment are the option, its default and its help text.

Nothing here imports torch, so that the command line can show its help at once.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_type_hints

from .errors import InputError
from .other_names import meant

Norm = Literal["batch", "instance", "none"]
NormStats = Literal["image", "running"]
Noise = Literal["off", "fixed", "random"]
Direction = Literal["AtoB", "BtoA"]
Fit = Literal["pad", "resize", "crop", "tile"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
Target = Literal["onnx", "tensorrt", "tensorrt-rtx"]
Backend = Literal["auto", "torch", "triton", "onnxruntime", "tensorrt", "tensorrt-rtx"]

_SCALARS: dict[type, tuple[type | UnionType, str]] = {
    bool: (bool, "True or False"),
    int: (int, "a whole number"),
    float: (int | float, "a number"),
}


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _check_seed(seed: int) -> None:
    _check(0 <= seed < 2**63, f"seed = {seed}: must be in [0, 2**63)")


def _check_types(config: Any) -> None:
    """Refuse a value outside a field's Literal, or no number where one is needed: dataclasses do not look."""
    for name, hint in get_type_hints(type(config)).items():
        value, allowed = getattr(config, name), get_args(hint) or (hint,)
        if value is None and NoneType in allowed:
            continue
        choices = [c for a in (hint, *allowed) for c in get_args(a) if isinstance(c, str)]
        if choices and value not in choices:
            raise InputError(f"{name} = {value!r}: allowed are {', '.join(dict.fromkeys(choices))}")
        for kind, (known, what) in _SCALARS.items():
            if kind in allowed and not (isinstance(value, known) and isinstance(value, bool) == (kind is bool)):
                raise InputError(f"{name} = {value!r}: must be {what}")


@dataclass(frozen=True)
class Generator:
    """What the generator is. Stored in every model file; enough to build the network again."""

    kind: Literal["unet", "encoder_decoder"] = "unet"  # U-Net with skips, or the paper's ablation without them
    depth: int = 8  # levels, each halves the image: 7 = unet_128, 8 = unet_256, 9 = unet_512
    in_channels: int = 3  # channels of the input image
    out_channels: int = 3  # channels of the output image
    ngf: int = 64  # feature channels of the first level; doubled per level up to 8 x
    norm: Norm = "batch"  # normalisation of generator and discriminator
    dropout: Literal["paper", "junyanz", "none"] = "paper"  # up-blocks with dropout 0.5: 1st-3rd, 2nd-4th, or none
    up: Literal["transposed", "resize"] = "transposed"  # 4x4 transposed conv, or nearest 2x and 3x3 conv

    def __post_init__(self) -> None:
        _check_types(self)
        _check(5 <= self.depth <= 12, f"depth = {self.depth}: allowed are 5 to 12 (8 is unet_256)")
        for name in ("in_channels", "out_channels", "ngf"):
            _check(getattr(self, name) >= 1, f"{name} = {getattr(self, name)}: must be at least 1")

    @property
    def multiple(self) -> int:
        """Height and width the network itself takes are multiples of this many pixels."""
        return 2**self.depth


@dataclass(frozen=True)
class Discriminator:
    """What the discriminator is: a PatchGAN; n_layers = 0 is the PixelGAN."""

    in_channels: int = 6  # condition and image together; the image alone where the discriminator is unconditional
    ndf: int = 64  # feature channels of the first layer
    n_layers: int = 3  # strided layers, 0 to 5; receptive fields 1, 16, 34, 70, 142, 286 pixels
    norm: Norm = "batch"  # normalisation

    def __post_init__(self) -> None:
        _check_types(self)
        _check(0 <= self.n_layers <= 5, f"n_layers = {self.n_layers}: allowed are 0 (PixelGAN) to 5")
        for name in ("in_channels", "ndf"):
            _check(getattr(self, name) >= 1, f"{name} = {getattr(self, name)}: must be at least 1")


@dataclass(frozen=True)
class Modes:
    """How a trained generator normalises and whether its dropout is on (README, "Modes")."""

    norm_stats: NormStats = "image"  # each image's own statistics, or the stored running ones
    noise: Noise = "off"  # dropout off, one fixed mask for every image, or a new mask per image
    seed: int = 0  # of the noise

    def __post_init__(self) -> None:
        _check_types(self)
        _check_seed(self.seed)

    def __str__(self) -> str:
        return f"{self.norm_stats}+{self.noise}"


@dataclass(frozen=True)
class Data:
    """Pairs, their jitter, and the loader."""

    direction: Direction = "AtoB"  # which half is the input: AtoB = left to right, BtoA = right to left
    crop_size: int = 256  # side of the training crop, and of validation images, in pixels
    load_size: int | None = None  # pixels a side of each half before the crop; default: 286/256 of crop_size
    flip: bool = True  # mirror a pair left-right with probability 0.5
    loader: Literal["auto", "torch", "dali"] = "auto"  # auto: DALI on a GPU where installed, else Pillow and torch
    workers: int | None = None  # loading processes (torch) or threads (dali); default: cores - 1, between 1 and 8
    holdout: int = 0  # pairs set aside for validation, of data without a val folder

    def __post_init__(self) -> None:
        _check_types(self)
        _check(self.crop_size >= 1, f"crop_size = {self.crop_size}: must be at least 1 pixel")
        _check(
            self.load >= self.crop_size,
            f"load_size = {self.load_size}: must be at least crop_size = {self.crop_size} (equal: no random crop)",
        )
        _check(self.workers is None or self.workers >= 0, f"workers = {self.workers}: must not be negative")
        _check(self.holdout >= 0, f"holdout = {self.holdout}: must not be negative")

    @property
    def load(self) -> int:
        """load_size with its default filled in: 286 for a crop of 256."""
        return round(self.crop_size * 286 / 256) if self.load_size is None else self.load_size


@dataclass(frozen=True)
class Train:
    """One training run."""

    generator: Generator = field(default_factory=Generator)  # the generator
    data: Data = field(default_factory=Data)  # the data
    ndf: int = 64  # feature channels of the discriminator's first layer
    n_layers: int = 3  # strided layers of the PatchGAN, 0 (PixelGAN) to 5 (ImageGAN); 3 is the 70x70 PatchGAN
    objective: Literal["l1+cgan", "l1+gan", "cgan", "gan", "l1"] = "l1+cgan"  # the paper's loss and its ablations
    gan_loss: Literal["bce", "lsgan"] = "bce"  # on the discriminator's logits
    lambda_l1: float = 100.0  # weight of the L1 loss
    batch: int = 1  # pairs in a step; under torchrun in every process, so a step takes batch x processes
    epochs: int = 200  # passes over the data
    schedule: Literal["linear", "constant"] = "linear"  # linear: the rate falls to zero over the last decay_epochs
    decay_epochs: int | None = None  # epochs of the linear decay; default: half of all
    lr: float = 2e-4  # Adam's learning rate
    beta1: float = 0.5  # Adam's decay of the first moment
    beta2: float = 0.999  # Adam's decay of the second moment
    pool: int = 0  # earlier outputs that the discriminator is shown again (image pool); 0: off
    ema: float = 0.0  # decay per step of an averaged generator, which is then the model that is saved; 0: off
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: fp32 on a CPU, else bf16 or fp16
    device: str = "auto"  # auto: cuda where there is one, else cpu; or cpu, cuda, cuda:1; torchrun: a GPU per process
    step: Literal["auto", "modules", "explicit"] = "auto"  # autograd, own passes and kernels, or the faster
    impl: Literal["auto", "reference", "triton"] = "auto"  # kernels of the explicit step: Triton or plain torch
    graph: Literal["auto", "on", "off"] = "auto"  # run the explicit step as CUDA graphs; auto: where possible
    convolutions: Literal["auto", "library", "own"] = "auto"  # of the explicit step: cuDNN, own, or auto: the faster
    tune_minutes: float = 2.0  # minutes that step and convolutions = auto may each measure, once per GPU; 0: none
    init: str | None = None  # start from a model (run, .safetensors, .pth); its network and direction are the defaults
    init_discriminator: str | None = None  # the same for the discriminator: a run (its newest checkpoint) or a file
    seed: int = 0  # of first weights, dropout, order and jitter
    deterministic: bool = False  # ask torch for deterministic algorithms (slower on a GPU; the CPU always is)
    max_steps: int = 0  # stop after this many steps; 0: no limit
    max_minutes: float = 0.0  # stop after this many minutes, validate and save; 0: no limit
    log_steps: int = 50  # steps between two lines of metrics
    validate_epochs: int = 10  # epochs between two validations; 0: only at the end, where there always is one
    checkpoint_minutes: float = 10.0  # minutes between two checkpoints; there always is one at the end
    checkpoint_steps: int = 0  # steps between two checkpoints, besides those by time; 0: none
    keep_checkpoints: int = 2  # how many of the newest checkpoints are kept
    best_by: Literal["l1", "psnr", "ssim", "match"] = "l1"  # validation metric that chooses the best model
    check_data: bool = True  # decode every image before the first step and name the broken ones
    tensorboard: bool = True  # write TensorBoard events beside metrics.jsonl
    profile: bool = False  # trace a few early steps into the run's profile/: trace, top kernels, launches and bytes

    def __post_init__(self) -> None:
        _check_types(self)
        self.discriminator()
        _check_seed(self.seed)
        for name in ("batch", "epochs", "log_steps", "keep_checkpoints"):
            _check(getattr(self, name) >= 1, f"{name} = {getattr(self, name)}: must be at least 1")
        for name in (
            "lambda_l1",
            "pool",
            "max_steps",
            "max_minutes",
            "validate_epochs",
            "checkpoint_steps",
            "tune_minutes",
        ):
            _check(getattr(self, name) >= 0, f"{name} = {getattr(self, name)}: must not be negative")
        for name in ("lr", "checkpoint_minutes"):
            _check(getattr(self, name) > 0, f"{name} = {getattr(self, name)}: must be positive")
        for name in ("beta1", "beta2", "ema"):
            _check(0 <= getattr(self, name) < 1, f"{name} = {getattr(self, name)}: must be in [0, 1)")
        _check(
            0 <= self.decay <= self.epochs,
            f"decay_epochs = {self.decay_epochs}: must be between 0 and epochs = {self.epochs}",
        )
        _check(
            self.adversarial or self.init_discriminator is None,
            f"init_discriminator = {self.init_discriminator}: objective = {self.objective} has no discriminator",
        )
        _check(
            self.graph != "on" or self.step == "explicit",
            f"graph = on: captures step = explicit; step is {self.step}",
        )
        _check(
            self.impl == "auto" or self.step == "explicit",
            f"impl = {self.impl}: chooses the kernels of step = explicit; step is {self.step}",
        )
        _check(
            self.convolutions == "auto" or self.step == "explicit",
            f"convolutions = {self.convolutions}: chooses who computes those of step = explicit; step is {self.step}",
        )
        _check(
            self.data.crop_size % self.generator.multiple == 0,
            f"crop_size = {self.data.crop_size}: a generator of depth {self.generator.depth} trains on multiples of "
            f"{self.generator.multiple} pixels; change crop_size or depth",
        )

    @property
    def decay(self) -> int:
        """decay_epochs with its default filled in."""
        if self.schedule == "constant":
            return 0
        return self.epochs // 2 if self.decay_epochs is None else self.decay_epochs

    @property
    def conditional(self) -> bool:
        """Whether the discriminator sees the input image beside the output."""
        return self.objective.endswith("cgan")

    @property
    def adversarial(self) -> bool:
        """Whether there is a discriminator at all."""
        return self.objective != "l1"

    def discriminator(self) -> Discriminator:
        """The discriminator that goes with the generator and the objective."""
        seen = self.generator.out_channels + (self.generator.in_channels if self.conditional else 0)
        return Discriminator(seen, self.ndf, self.n_layers, self.generator.norm)


@dataclass(frozen=True)
class Infer:
    """Translate images and videos."""

    norm_stats: NormStats | None = None  # image or running statistics; default: the model's record, else image
    noise: Noise | None = None  # dropout off, fixed or random; default: the model's record, else off
    seed: int = 0  # of the noise
    backend: Backend = "auto"  # what runs the generator; auto: torch, or triton where tune found it faster
    device: str = "auto"  # auto: cuda where there is one, else cpu; or cpu, cuda, cuda:1
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: fp32 on a CPU, else bf16 or fp16
    batch: int = 1  # images of equal size, or frames of several videos, that are translated together
    cache: bool = True  # keep the engines that backend = tensorrt or tensorrt-rtx builds from a model
    cache_gib: float = 4.0  # GiB of engines kept; the least used go first
    direction: Direction | None = None  # the images are A|B pairs: translate the left half (AtoB) or the right (BtoA)
    side_by_side: bool = False  # of an image, write input | output into one file
    suffix: str | None = None  # of files in a folder: png for images, mp4 for videos, png for a video's frames
    overwrite: bool = False  # replace outputs that exist
    profile: str | None = None  # folder for a trace of a few translations of images, top kernels, launches and bytes

    def __post_init__(self) -> None:
        _check_types(self)
        _check(self.batch >= 1, f"batch = {self.batch}: must be at least 1")
        _check(self.cache_gib > 0, f"cache_gib = {self.cache_gib}: must be positive")
        _check_seed(self.seed)


@dataclass(frozen=True)
class Raw:
    """Frames without a container: what --raw says of them."""

    pixels: str  # FFmpeg's name of the pixel format
    width: int
    height: int
    rate: float  # frames per second


@dataclass(frozen=True)
class Fitted:
    """How pictures get into a network, of images and of video."""

    fit: Fit = "pad"  # pad: at its own size; tile: so, in squares; resize: scaled to size; crop: its centre, so
    size: str | None = None  # 256 or 256x512 (height x width); pad, tile: at most; resize, crop: so, default: trained
    tile: int = 512  # pixels a side of the squares of fit = tile, which overlap by a quarter

    def __post_init__(self) -> None:
        _check_types(self)
        _check(self.tile > 0, f"tile = {self.tile}: must be positive")
        _check(
            self.fit == "tile" or self.tile == Fitted.tile,
            f"tile = {self.tile}: side of the squares of fit = tile; fit is {self.fit}",
        )
        _ = self.sides

    @property
    def sides(self) -> tuple[int, int] | None:
        """(height, width) of --size."""
        if self.size is None:
            return None
        sides = _numbers("size", str(self.size).split("x"), str(self.size))
        _check(len(sides) in (1, 2), f"size = {self.size}: allowed are 256 and 256x512 (height x width)")
        return sides[0], sides[-1]


@dataclass(frozen=True)
class Stream(Fitted):
    """Translate video; fit, size and tile are of images too."""

    live: bool = False  # real time: late frames are dropped instead of falling behind; files play at their own speed
    fps: float | None = None  # frames per second of a folder of images that is read as a video; default: 25
    raw: str | None = None  # frames on stdin (-) without a container: rgb24:1280x720@30 (pixels:width x height@fps)
    stream: int | None = None  # number of the video stream in the file, as ffprobe counts; default: FFmpeg's choice
    audio: Literal["all", "none"] = "all"  # copy all of the source's sound, or none
    codec: str = "auto"  # encoder: libx264 (GPL), libsvtav1, ...; auto: libx264, libvpx-vp9 of .webm, none of .y4m
    quality: int | None = None  # constant rate factor, lower is better; default: 20 for libx264, 32 for the free codecs
    pixel_format: str | None = None  # FFmpeg's name, of the output; default: yuv420p, rgb24 for raw frames on stdout
    hwaccel: Literal["auto", "cuda", "none"] = "auto"  # decode with NVDEC; auto: where the model runs on a GPU
    frames: Literal["auto", "cpu", "cuda"] = "auto"  # where colours and sizes are converted; auto: cpu
    preview: int | None = None  # port of a page on 127.0.0.1 that shows input | output live; 0: any that is free
    steady: float = 0.0  # share of the last output that is kept where the input stands still, from 0 to below 1
    timeout: float = 10.0  # seconds that a network may be silent: a source is opened again then, a live sink given up
    reconnects: int = 5  # times in one outage that a network source is opened again
    max_frames: int = 0  # stop after this many frames of every source; 0 = no limit
    stats: str | None = None  # file for the figures of the run as JSON

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("fps", "timeout"):
            value = getattr(self, name)
            _check(value is None or value > 0, f"{name} = {value}: must be positive")
        for name in ("stream", "quality", "reconnects", "max_frames"):
            value = getattr(self, name)
            _check(value is None or value >= 0, f"{name} = {value}: must not be negative")
        _check(0 <= self.steady < 1, f"steady = {self.steady}: must be in [0, 1)")
        _check(self.preview is None or 0 <= self.preview < 2**16, f"preview = {self.preview}: a port is 0 to 65535")
        _ = self.raw_format

    @property
    def raw_format(self) -> Raw | None:
        """--raw, read."""
        if self.raw is None:
            return None
        found = re.fullmatch(r"([a-z0-9]+):([1-9]\d*)x([1-9]\d*)@(\d+(?:\.\d+)?)", self.raw)
        _check(
            found is not None and float(found[4]) > 0,
            f"raw = {self.raw}: allowed is pixels:width x height@fps, as in rgb24:1280x720@30",
        )
        assert found is not None
        return Raw(found[1], int(found[2]), int(found[3]), float(found[4]))


@dataclass(frozen=True)
class Form:
    """What an exported generator takes and gives, and in which precision it computes."""

    precision: Precision = "fp32"  # of convolutions; statistics are fp32 in all of them
    batch: int | None = 1  # images of a call; None: any number
    height: int | None = 256  # pixels; None, then of both sides: any multiple of the generator's
    width: int | None = 256  # pixels
    pixels: Literal["float", "uint8"] = "float"  # [N, C, H, W] fp32 in [-1, 1], or [N, H, W, C] 0 to 255

    def __post_init__(self) -> None:
        _check_types(self)
        _check((self.height is None) == (self.width is None), f"{self.height} x {self.width}: give both sides or none")
        for name in ("batch", "height", "width"):
            value = getattr(self, name)
            _check(value is None or value >= 1, f"{name} = {value}: must be at least 1")


@dataclass(frozen=True)
class Build:
    """Export a generator and build an engine from it."""

    target: Target = "onnx"  # what is built; onnx runs anywhere, the others on NVIDIA GPUs
    precision: Literal["auto", Precision] = "auto"  # of convolutions; auto: the fastest that passes the gate
    norm_stats: NormStats | None = None  # image or running statistics; default: the model's record, else image
    noise: Noise | None = None  # dropout off, fixed or random; default: the model's record, else off
    seed: int = 0  # of the noise
    size: str | None = None  # 256, 256x512 (height x width), or smallest,usual,largest; default: the record's, else 256
    batch: str = "1"  # images in a call: one number, or smallest,usual,largest
    pixels: Literal["float", "uint8"] = "float"  # [N, C, H, W] fp32 in [-1, 1], or [N, H, W, C] uint8
    calibration: str | None = None  # pairs that int8 and fp8 are calibrated and compared on; default: painted facades
    direction: Direction | None = None  # which half of a pair is the input; default: the model's record, else AtoB
    calibration_images: int = 32  # images that int8 and fp8 are calibrated on
    gate_images: int = 8  # images compared with the fp32 generator after the build
    max_difference: float | None = None  # largest difference of a pixel that passes, in levels; default: by precision
    mean_difference: float | None = None  # largest mean difference of an image that passes; default: by precision
    capabilities: str | None = None  # of tensorrt-rtx: the GPUs to build for, as sm80,sm86; default: the one here
    workspace: int | None = None  # MiB of GPU memory a layer may use for scratch; default: the builder's
    timing_cache: str | None = None  # file that keeps what the builder measured, read and written
    version_compatible: bool = False  # for other programs: a plan that lean runtimes of later versions load
    refit: bool = False  # for other programs: a plan whose weights can be replaced
    strip: bool = False  # for other programs: a plan without its weights
    device: str = "auto"  # GPU to build and compare on: auto, cuda, cuda:1; cpu: do not use one
    overwrite: bool = False  # replace the output if it exists

    def __post_init__(self) -> None:
        _check_types(self)
        _check_seed(self.seed)
        for name in ("calibration_images", "gate_images"):
            _check(getattr(self, name) >= 1, f"{name} = {getattr(self, name)}: must be at least 1")
        for name in ("max_difference", "mean_difference", "workspace"):
            value = getattr(self, name)
            _check(value is None or value > 0, f"{name} = {value}: must be positive")
        _ = self.sizes, self.batches

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of one size, or of the smallest, usual and largest; none where the record decides."""
        found = [_numbers("size", text.split("x"), str(self.size)) for text in _items(self.size)]
        _check(
            len(found) in (0, 1, 3) and all(len(sides) in (1, 2) for sides in found),
            f"size = {self.size}: allowed are 256, 256x512 (height x width) and smallest,usual,largest",
        )
        sizes = tuple((sides[0], sides[-1]) for sides in found)
        _check_rising("size", str(self.size), [height for height, _ in sizes], [width for _, width in sizes])
        return sizes

    @property
    def batches(self) -> tuple[int, ...]:
        """Images of a call: one number, or the smallest, usual and largest."""
        found = _numbers("batch", _items(self.batch), self.batch)
        _check(len(found) in (1, 3), f"batch = {self.batch}: allowed are one number and smallest,usual,largest")
        _check_rising("batch", self.batch, found)
        return tuple(found)


BENCH_PARTS = ("kernels", "layers", "steps", "loader", "engines", "frames", "video", "startup")


@dataclass(frozen=True)
class Bench:
    """Measure this machine: everything here beside plainly written baselines, checked to compute the same."""

    parts: str = ",".join(BENCH_PARTS)  # what is compared, in this order
    scale: Literal["full", "short", "smoke"] = "full"  # full: minutes; short: smaller networks; smoke: a try
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile, which takes minutes, is among them; auto: on a GPU
    device: str = "auto"  # auto: cuda where there is one, else cpu; or cpu, cuda, cuda:1
    threads: int = 0  # CPU threads; 0: as many as torch chooses

    def __post_init__(self) -> None:
        _check_types(self)
        unknown = [part for part in self.chosen if part not in BENCH_PARTS]
        _check(
            bool(self.chosen) and not unknown,
            f"parts = {self.parts}: allowed are {', '.join(BENCH_PARTS)}, separated by commas",
        )
        _check(self.threads >= 0, f"threads = {self.threads}: must not be negative")

    @property
    def chosen(self) -> tuple[str, ...]:
        """The parts."""
        return tuple(_items(self.parts))


def _items(text: str | None) -> list[str]:
    """A comma-separated list of the command line."""
    return [item.strip() for item in str(text).split(",")] if text else []


def _numbers(name: str, items: list[str], given: str) -> list[int]:
    _check(all(i.isdecimal() and int(i) >= 1 for i in items), f"{name} = {given}: must be whole numbers of at least 1")
    return [int(item) for item in items]


def _check_rising(name: str, given: str, *rows: list[int]) -> None:
    _check(all(row == sorted(row) for row in rows), f"{name} = {given}: give the smallest first and the largest last")


def train_config(**options: Any) -> Train:
    """A Train from flat option names: `train_config(direction="BtoA", ngf=16, epochs=10)`.

    The names are the fields of Train, Generator and Data; an unknown one raises InputError with the nearest known.
    """
    parts = by_owner(options, Train, Generator, Data)
    return Train(generator=Generator(**parts[Generator]), data=Data(**parts[Data]), **parts[Train])


def stream_config(**options: Any) -> Stream:
    """A Stream from its fields by name; an unknown one raises InputError with the nearest known."""
    return Stream(**by_owner(options, Stream)[Stream])


def build_config(**options: Any) -> Build:
    """A Build from its fields by name; an unknown one raises InputError with the nearest known."""
    return Build(**by_owner(options, Build)[Build])


def by_owner(options: dict[str, Any], *kinds: type) -> dict[type, dict[str, Any]]:
    """The options sorted by the dataclass that has them; an unknown one raises InputError with the one it may mean."""
    parts: dict[type, dict[str, Any]] = {kind: {} for kind in kinds}
    owner = {f.name: part for part in parts for f in dataclasses.fields(part) if f.name not in ("generator", "data")}
    for name, value in options.items():
        if name not in owner:
            near = meant(name, owner)
            hint = f"; did you mean {near}?" if near else f"; allowed are {', '.join(sorted(owner))}"
            raise InputError(f"unknown option {name}{hint}")
        parts[owner[name]][name] = value
    return parts


def from_record(kind: type, record: dict[str, Any]) -> Any:
    """A config dataclass from its JSON form (dataclasses.asdict); unknown fields are refused by name."""
    known = {f.name for f in dataclasses.fields(kind)}
    if unknown := sorted(set(record) - known):
        raise InputError(f"unknown {kind.__name__} fields {', '.join(unknown)}: written by a newer version?")
    values = dict(record)
    for name, part in (("generator", Generator), ("data", Data)):
        if isinstance(values.get(name), dict):
            values[name] = from_record(part, values[name])
    return kind(**values)
