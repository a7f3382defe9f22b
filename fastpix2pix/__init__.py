"""fastpix2pix: train paired image-to-image translation and run it, fast.

Names are resolved on first use, so that importing the package is cheap and touches no GPU:

    import fastpix2pix as f2p
    f2p.train("facades", "run", direction="BtoA")
    g = f2p.load("run")
    picture = g(label)                  # PIL image, uint8 array or float tensor in, the same kind out
    f2p.evaluate("run", "facades")
    f2p.Stream(g, "in.mp4", "out.mp4").run()  # camera, URL, folder of frames; see `fastpix2pix infer --help`
    frames = f2p.Frames(g, 720, 1280)   # frames of your own program: submit and collect, or translate
    f2p.build("run", "model.engine", target="tensorrt-rtx", capabilities="sm80")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "CheckFailed": "errors",
    "EnvironmentFailed": "errors",
    "FrameRuntime": "runtime.native",
    "Frames": "streaming.frames",
    "InputError": "errors",
    "InputSpec": "runtime.native",
    "OutputSpec": "runtime.native",
    "Stream": "streaming.stream",
    "build": "building.build",
    "evaluate": "evaluation",
    "load": "runtime.load",
    "train": "training.loop",
}
__all__ = [*_HOME, "__version__"]

if TYPE_CHECKING:
    from .building.build import build as build
    from .errors import CheckFailed as CheckFailed
    from .errors import EnvironmentFailed as EnvironmentFailed
    from .errors import InputError as InputError
    from .evaluation import evaluate as evaluate
    from .runtime.load import load as load
    from .runtime.native import FrameRuntime as FrameRuntime
    from .runtime.native import InputSpec as InputSpec
    from .runtime.native import OutputSpec as OutputSpec
    from .streaming.frames import Frames as Frames
    from .streaming.stream import Stream as Stream
    from .training.loop import train as train


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastpix2pix' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
