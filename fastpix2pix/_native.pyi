"""The frame runtime's extension (csrc/). Import it through fastpix2pix.runtime.native, which says what is missing.

Sizes are (height, width), boxes (top, left, height, width), in pixels. Bad input raises InputError, a failing machine
or engine EnvironmentFailed.

A frame of uint8 is one contiguous buffer with its planes one after the other, or a tuple or list of planes at any row
distance. Planes: rgb, bgr [H, W, 3], rgba [H, W, 4]; nv12 Y [H, W], UV [h, w, 2]; yuv420 Y [H, W], U and V [h, w];
h and w are half of H and W, rounded up. A plane may also be [rows, bytes].
A network tensor is a contiguous [3, H, W] (layout nchw) or [H, W, 3] (nhwc), or one of them in a batch of 1, in -1..1.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, TypedDict

from typing_extensions import Buffer

class _SupportsDLPack(Protocol):
    def __dlpack__(self, *, stream: Any = ...) -> Any: ...

class _SupportsCuda(Protocol):
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...

_Memory: TypeAlias = Buffer | _SupportsDLPack  # a tensor on the CPU shares its memory
_Frame: TypeAlias = _Memory | tuple[_Memory, ...] | list[_Memory]
_DeviceFrame: TypeAlias = _SupportsCuda | tuple[_SupportsCuda, ...] | list[_SupportsCuda]
_Size: TypeAlias = tuple[int, int]
_Box: TypeAlias = tuple[int, int, int, int]

CUDA: str | None  # version of CUDA this was built with, such as "13.0"

class _Frames(TypedDict):
    """submitted is the sum of the others, at any time."""

    submitted: int  # handed in, refused ones included
    collected: int
    dropped_oldest: int
    dropped_newest: int
    late: int  # past their deadline before they were begun
    failed: int  # in work when the engine failed
    abandoned: int  # still inside at close or at a failure
    pending: int  # inside now

class _Stage(TypedDict):
    """Of a histogram with eight buckets per doubling: quantiles are at most 1/8 too high, the maximum is exact."""

    count: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float

class _Latency(TypedDict):
    queue: _Stage  # submitted until begun
    upload: _Stage  # on the CPU the conversion to the network's input
    compute: _Stage  # the engine; on CUDA with both conversions, which are in one graph with it
    download: _Stage  # on the CPU the conversion to a frame
    total: _Stage  # submitted until ready to collect

class _Stats(TypedDict):
    frames: _Frames
    latency: _Latency

class _About(TypedDict):
    device: str
    graph: str  # none (off, or on the CPU), captured, child, or "none: " and why it could not be captured
    slots: int
    depth: int
    policy: str

class InputSpec:
    """From a frame to the network's input: crop of the frame -> resized to place -> border around it -> -1..1."""

    def __init__(
        self,
        format: str,  # rgb, bgr, rgba (alpha is dropped), nv12 or yuv420
        frame: _Size,
        network: _Size,
        *,
        crop: _Box | None = None,  # of the frame; None: all of it
        place: _Box | None = None,  # of the network's input, where the crop is resized to; None: all of it
        border: str = "reflect",  # or constant
        fill: float = 0.0,  # level 0..255 of a constant border
        filter: str = "bicubic",  # bilinear, bicubic or area
        matrix: str = "bt709",  # or bt601
        range: str = "limited",  # or full
        layout: str = "nchw",  # or nhwc
        dtype: str = "float32",  # or float16
    ) -> None: ...

class OutputSpec:
    """From the network's output to a frame: region -> resized to the frame -> levels, rounded to nearest."""

    def __init__(
        self,
        format: str,
        frame: _Size,
        network: _Size,
        *,
        region: _Box | None = None,  # of the network's output; None: all of it
        filter: str = "bicubic",
        matrix: str = "bt709",
        range: str = "limited",
        layout: str = "nchw",
        dtype: str = "float32",
    ) -> None: ...

class InputPlan:
    """One conversion on the CPU, by `threads` threads. Releases the GIL; calls from several threads take turns."""

    def __init__(self, spec: InputSpec, threads: int = 1) -> None: ...
    def run(self, network: _Memory, frame: _Frame) -> None:
        """Write the network tensor."""

class OutputPlan:
    """The way back."""

    def __init__(self, spec: OutputSpec, threads: int = 1) -> None: ...
    def run(self, frame: _Frame, network: _Memory) -> None:
        """Write the frame."""

class FrameRuntime:
    """Frames in, translated frames out, in order, through a ring of slots. Any threads may submit and collect.

    engine: None: the input is the output. On the CPU engine(input, output) with numpy arrays, the same pair for a slot
    at every call, on a thread of the runtime. On CUDA, kind "call": engine(input, output, stream) with addresses, which
    enqueues on the stream; kind "graph": engine(input, output) -> the address of a finished cudaGraph_t of that work,
    which is copied. Memory that captured or given work uses must stay its own for as long as the runtime lives; the
    runtime holds on to `engine`. What an engine raises surfaces in the next call as EnvironmentFailed.
    """

    def __init__(
        self,
        input: InputSpec,
        output: OutputSpec,
        engine: Callable[..., Any] | None,
        *,
        device: str = "cpu",  # or cuda, cuda:N
        kind: str = "call",  # or graph
        graph: str = "auto",  # capture the work of a slot in a CUDA graph: auto (say so if it cannot be), on or off
        slots: int = 4,  # 2 to 64 frames inside
        depth: int = 2,  # of them in work at once; those can no longer be dropped
        policy: str = "block",  # while every slot is taken: block, drop-oldest or drop-newest
        threads: int = 1,  # of the pixel conversions on the CPU
    ) -> None: ...
    def submit(
        self,
        frame: _Frame | _DeviceFrame,
        tag: int = 0,  # comes back from collect
        *,
        deadline: float | None = None,  # seconds from now; a frame not begun by then is dropped as late
        timeout: float | None = None,  # seconds to wait for a slot
    ) -> bool:
        """Copy a frame in; False: it was not taken (drop-newest, or after `timeout`, which is not counted).

        On CUDA a frame may lie on the GPU: a DLPack tensor, an object with __cuda_array_interface__, or a tuple of
        planes of them; they are held until the frame has been read or given up, and the next call of submit, collect
        or close lets go of them.
        """

    def collect(self, frame: _Frame, *, timeout: float | None = None) -> int | None:
        """Copy the next frame out and give its tag; None after `timeout`, or once finished and empty (`drained`)."""

    def poll(self, frame: _Frame) -> int | None:
        """collect without waiting."""

    def finish(self) -> None:
        """No more frames will come: collect gives the rest, then None."""

    @property
    def drained(self) -> bool:
        """finish was called and no frame is inside."""

    def close(self) -> None:
        """Stop. Frames inside are abandoned, work on the device is waited for. May be called twice, from any thread."""

    def stats(self) -> _Stats:
        """Counters, and the latency of each stage so far."""

    def describe(self) -> _About:
        """What this runtime is."""
