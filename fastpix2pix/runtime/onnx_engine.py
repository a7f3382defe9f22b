"""Run an exported generator with ONNX Runtime, on the CPU or on CUDA. The file alone is enough."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import Form, Generator, Modes, from_record
from ..data.images import to_uint8, to_unit
from ..device import with_index
from ..errors import EnvironmentFailed, InputError
from ..model.weights import FORMAT, KEY
from ..openmp import release_team
from .buffers import buffer_layout, buffer_shape, check_buffers
from .engine import INPUT, OUTPUT
from .masks import Masks

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_NUMPY = {torch.float32: np.float32, torch.uint8: np.uint8}


def not_supported_reasons(device: str | torch.device = "cpu") -> list[str]:
    """Why ONNX Runtime cannot run on a device here, with what to install."""
    if find_spec("onnxruntime") is None:
        return ["ONNX Runtime is not installed (pip install 'fastpix2pix[onnx]')"]
    import onnxruntime

    if torch.device(device).type == "cuda" and _PROVIDERS["cuda"] not in onnxruntime.get_available_providers():
        return ["this ONNX Runtime has no CUDA (pip install onnxruntime-gpu in place of onnxruntime, or device = cpu)"]
    return []


class OnnxEngine:
    """An .onnx file made by `fastpix2pix build`, ready to run; record, modes and form come from its metadata.

    Raises EnvironmentFailed where ONNX Runtime cannot run on the device, InputError for a file it cannot run (its CPU
    has no bf16 and no fp8), for a damaged one and for one that was made elsewhere.
    """

    def __init__(self, model: str | Path | bytes, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        self.name = "the ONNX graph" if isinstance(model, bytes) else str(model)
        if reasons := not_supported_reasons(self.device):
            raise EnvironmentFailed(f"{self.name} cannot run on {self.device}: {'; '.join(reasons)}")
        if not isinstance(model, bytes) and not Path(model).is_file():
            raise InputError(f"{model}: no such file")
        self.device = with_index(self.device)
        self._session = self._open(model)
        self.record = self._read_record()
        config = from_record(Generator, self.record["architecture"])
        self.modes, self.form = from_record(Modes, self.record["modes"]), from_record(Form, self.record["form"])
        self.in_channels, self.out_channels = config.in_channels, config.out_channels
        self.multiple = config.multiple
        self.layout = buffer_layout(self.form)
        self._masks = Masks(config, self.modes, self.form)

    def translate(
        self,
        batch: Tensor,  # [N, in_channels, H, W] float32 in [-1, 1], on `device`
        first: int = 0,  # running number of the first image
    ) -> Tensor:
        """[N, out_channels, H, W] float32 in [-1, 1]. Any N: a graph for 4 images translates 1 as 4.

        A graph for uint8 pixels rounds its input to 8 bits. Raises InputError for a size that the graph does not take.
        """
        at_once = self.form.batch or len(batch)
        found = [self._chunk(batch[i : i + at_once], first + i) for i in range(0, len(batch), at_once)]
        return torch.cat(found) if len(found) > 1 else found[0]

    def enqueue(
        self,
        input: Tensor,  # [n, C, H, W] float32 or [n, H, W, C] uint8 (form.pixels), contiguous, on `device`
        output: Tensor,  # the same of the output; written
        stream: torch.cuda.Stream | None = None,  # what `input` waits for
        first: int = 0,  # running number of the first image
    ) -> None:
        """One call on the caller's buffers, without a copy. ONNX Runtime has no other stream: it is done on return."""
        channels = self.in_channels, self.out_channels
        n, height, width = check_buffers(self.form, input, output, channels, self.device)
        self._check_shape(n, height, width)
        if stream is not None:
            stream.synchronize()
        binding = self._session.io_binding()
        masks = {name: self._masks(name, n, height, width, first) for name in self._masks.names}
        for name, tensor in {INPUT: input, **masks}.items():
            binding.bind_input(name, *_place(tensor))
        binding.bind_output(OUTPUT, *_place(output))
        if self.device.type == "cpu":
            release_team()  # torch's threads, where the caller's own work left them spinning
        self._session.run_with_iobinding(binding)

    def apart(self) -> OnnxEngine:
        """Itself: ONNX Runtime gives every call its own memory."""
        return self

    def describe(self) -> dict[str, Any]:
        """As of an Engine, with the GPU's name and the pixels."""
        described = {"backend": "onnxruntime", "device": str(self.device), "precision": self.form.precision}
        if self.device.type == "cuda":
            described["gpu"] = torch.cuda.get_device_name(self.device)
        form = self.form
        sizes = [] if form.height is None else [[form.height, form.width]]
        return {**described, "pixels": form.pixels, "sizes": sizes, "batches": [form.batch] if form.batch else []}

    def _open(self, model: str | Path | bytes) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Threads that spin after a call take the cores from torch's own: twice the time of a frame on two cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3  # errors; they come as exceptions anyway
        provider = _PROVIDERS[self.device.type]
        # TF32, on by default, would round products of an fp32 graph to 10 bits
        place = {"device_id": self.device.index or 0, "use_tf32": 0} if self.device.type == "cuda" else {}
        given = model if isinstance(model, bytes) else str(model)
        try:
            session = onnxruntime.InferenceSession(given, options, providers=[(provider, place)])
        except Exception as error:  # every kind of bad file has a class of its own
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"{self.name}: ONNX Runtime cannot run it on {self.device} ({reason}); build it again; on a CPU run "
                "fp32, fp16 and int8"
            ) from error
        if session.get_providers()[0] != provider:
            raise EnvironmentFailed(f"{self.name}: ONNX Runtime could not start CUDA; use device = cpu")
        return session

    def _read_record(self) -> dict[str, Any]:
        text = self._session.get_modelmeta().custom_metadata_map.get(KEY)
        if text is None:
            raise InputError(
                f"{self.name}: an ONNX file without a {KEY} record; make one with `{KEY} build MODEL --target onnx`"
            )
        try:
            record: dict[str, Any] = json.loads(text)
            version = record["format"]
            if version == FORMAT:
                for name, kind in (("architecture", Generator), ("modes", Modes), ("form", Form)):
                    from_record(kind, record[name])
        except (InputError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.name}: damaged record ({type(error).__name__}: {error}); build it again"
            ) from error
        if version != FORMAT:
            raise InputError(f"{self.name}: format {version}, this version reads {FORMAT}; build the file again")
        return record

    def _chunk(
        self,
        batch: Tensor,  # [n, C, H, W] float32 in [-1, 1], n at most form.batch
        first: int,
    ) -> Tensor:
        n, _, height, width = batch.shape
        missing = (self.form.batch or n) - n
        if missing:
            batch = torch.cat([batch, batch[-1:].expand(missing, -1, -1, -1)])
        uint8 = self.form.pixels == "uint8"
        given = to_uint8(batch).permute(0, 2, 3, 1) if uint8 else batch
        shape = buffer_shape(self.form, len(batch), height, width, self.out_channels)
        out = torch.empty(shape, dtype=given.dtype, device=self.device)
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        self.enqueue(given.contiguous(memory_format=torch.contiguous_format), out, stream, first)
        return (to_unit(out.permute(0, 3, 1, 2)) if uint8 else out)[:n]

    def _check_shape(self, n: int, height: int, width: int) -> None:
        form = self.form
        if form.height is None and (height % self.multiple or width % self.multiple):
            raise InputError(f"{height}x{width} pixels: {self.name} takes multiples of {self.multiple}; pad the image")
        if form.height is not None and (height, width) != (form.height, form.width):
            raise InputError(
                f"{height}x{width} pixels (after padding to multiples of {self.multiple}): {self.name} takes "
                f"{form.height}x{form.width}; give that size (infer: fit = resize or crop), or build one with "
                "size = smallest,usual,largest"
            )
        if form.batch not in (None, n):
            raise InputError(f"{n} images in one call: {self.name} takes {form.batch}")


def _place(tensor: Tensor) -> tuple[str, int, Any, tuple[int, ...], int]:
    """Where a tensor lies, in ONNX Runtime's terms."""
    device = tensor.device
    return device.type, device.index or 0, _NUMPY[tensor.dtype], tuple(tensor.shape), tensor.data_ptr()
