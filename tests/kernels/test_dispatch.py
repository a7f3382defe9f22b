"""Who runs an op, what the tape records, and a package that works without Triton and never asks the device."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastpix2pix.config import train_config
from fastpix2pix.kernels import dispatch, losses
from fastpix2pix.kernels.adam import adam, advance, found_inf_
from fastpix2pix.kernels.dispatch import NotSupported, choose, overlapping, recorded
from fastpix2pix.kernels.losses import gan_loss, l1_tanh_loss
from fastpix2pix.kernels.split import sum_splits
from fastpix2pix.training.plan_sites import candidates_of
from fastpix2pix.training.plans import static_plans
from tests.kernels.common import DEVICE, needs_triton

ROOT = Path(__file__).resolve().parents[2]
X = torch.zeros(4)


@pytest.fixture(autouse=True)
def no_choice_from_outside(monkeypatch):
    monkeypatch.delenv("FASTPIX2PIX_IMPL", raising=False)


def test_auto_on_a_cpu_is_the_reference():
    assert choose("adam", "auto", X, []) == "reference"
    assert choose("adam", "reference", X, ["whatever"]) == "reference"


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter is for a machine without a GPU")
def test_triton_on_a_cpu_is_the_interpreter():
    assert choose("adam", "triton", X, []) == "triton"


@needs_triton
def test_auto_falls_back_and_a_name_raises(monkeypatch):
    monkeypatch.setattr(dispatch, "interpreted", False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_gpu = torch.empty(4, device="cuda")  # no storage: choose only asks where it is
    assert choose("adam", "auto", on_gpu, []) == "triton"
    assert choose("adam", "auto", on_gpu, ["p is not contiguous"]) == "reference"
    with pytest.raises(NotSupported, match=r"adam: .* p is not contiguous; use impl = auto or reference"):
        choose("adam", "triton", on_gpu, ["p is not contiguous"])
    monkeypatch.setattr(dispatch, "interpreted", True)
    with pytest.raises(NotSupported, match="TRITON_INTERPRET=1 is for tensors on a CPU"):
        choose("adam", "triton", on_gpu, [])


@needs_triton
def test_a_name_lists_every_reason(monkeypatch):
    monkeypatch.setattr(dispatch, "interpreted", False)
    every = "own kernels need a CUDA GPU; the device is cpu (TRITON_INTERPRET=1 runs them there, for tests); one; two;"
    with pytest.raises(NotSupported, match=re.escape(every)):
        choose("adam", "triton", X, ["one", "two"])


def test_unknown_implementation():
    with pytest.raises(NotSupported, match=r"impl = 'cuda': allowed are auto, reference, triton"):
        choose("adam", "cuda", X, [])


ENVIRONMENT = [
    ("", "adam", "reference", "unset"),
    ("reference", "adam", "reference", "every op"),
    ("triton", "adam", "triton", "every op, as if asked for by name"),
    ("adam=triton", "adam", "triton", "one op"),
    ("adam=triton", "losses", "reference", "not the others"),
    ("triton, adam=reference", "adam", "reference", "all but one; the last match counts; blanks"),
    ("losses=reference,adam=triton", "adam", "triton", "a list"),
    ("adam=auto", "adam", "reference", "auto by name"),
]


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="rows are for a CPU, where auto is the reference")
@pytest.mark.parametrize(("text", "op", "chosen", "reason"), ENVIRONMENT, ids=[row[-1] for row in ENVIRONMENT])
def test_environment_variable_replaces_auto(monkeypatch, text, op, chosen, reason):
    monkeypatch.setenv("FASTPIX2PIX_IMPL", text)
    assert choose(op, "auto", X, []) == chosen
    assert choose(op, "reference", X, []) == "reference"  # a name in the code is not replaced


@pytest.mark.parametrize("text", ["fast", "adam=fast", "adma=reference", "=reference", "adam=", "adam:triton"])
def test_environment_variable_refusals(monkeypatch, text):
    monkeypatch.setenv("FASTPIX2PIX_IMPL", text)
    with pytest.raises(NotSupported, match=rf"FASTPIX2PIX_IMPL = '{text}': .* is neither IMPL nor OP=IMPL"):
        choose("adam", "auto", X, [])


def test_every_op_may_be_named():
    """What the modules hand to choose is what the variable accepts."""
    called = set()
    for path in (ROOT / "kernels").glob("*.py"):
        called |= set(re.findall(r'choose\("(\w+)"', path.read_text(encoding="utf-8")))
    assert called == set(dispatch.OPS)


def arena(n: int = 300) -> dict[str, torch.Tensor]:
    names = ("p", "m", "v", "g")
    tensors = {name: torch.full((n,), 0.01 * i, device=DEVICE) for i, name in enumerate(names)}
    tensors["half"] = torch.zeros(n, dtype=torch.bfloat16, device=DEVICE)
    return tensors | {"lr": torch.tensor(2e-4, device=DEVICE), "step": torch.tensor(1, device=DEVICE)}


@needs_triton
def test_tape_entry():
    a = arena()
    with recorded() as tape:
        adam(**a, beta1=0.5, beta2=0.999, impl="triton")
    (entry,) = tape
    assert (entry.kernel, entry.grid) == ("_adam_kernel", (1, 1, 1))
    assert entry.arguments[0] == (a["p"].data_ptr(), (300,), (1,), torch.float32)
    assert entry.arguments[4] == (a["half"].data_ptr(), (300,), (1,), torch.bfloat16)
    assert entry.arguments[7] is None  # no loss scale
    assert entry.arguments[-1] == 300
    assert entry.options == (("BLOCK", 1024),)
    assert (entry.read, entry.written) == (300 * 16, 300 * 14)


@needs_triton
def test_two_steps_leave_the_same_tape_and_other_constants_another():
    a = arena()
    counters, flag = torch.zeros(3, dtype=torch.int64, device=DEVICE), torch.zeros((), device=DEVICE)

    def step(beta1: float = 0.5) -> list[dispatch.Launch]:
        with recorded() as tape:
            found_inf_(a["g"], flag, impl="triton")
            adam(**a, beta1=beta1, beta2=0.999, found_inf=flag, impl="triton")
            advance(counters, a["step"], 4, flag, impl="triton")
        return tape

    first = step()
    a["lr"].fill_(1e-4)  # what changes between steps is on the device
    second = step()
    assert [entry.kernel for entry in first] == ["_found_inf_kernel", "_adam_kernel", "_advance_kernel"]
    assert first == second
    assert step(beta1=0.9) != first
    assert counters.tolist() == [0, 3, 12] and a["step"] == 4


@needs_triton
def test_tapes_nest_and_end():
    counters, adam_step = (
        torch.zeros(3, dtype=torch.int64, device=DEVICE),
        torch.ones((), dtype=torch.int64, device=DEVICE),
    )

    def one() -> None:
        advance(counters, adam_step, 1, impl="triton")

    with recorded() as outer:
        with recorded() as empty:  # equal to the outer one when it ends: only identity tells them apart
            pass
        with recorded() as inner:
            one()
        one()
        with pytest.raises(KeyError), recorded() as failed:
            one()
            raise KeyError
    one()
    assert [len(tape) for tape in (outer, empty, inner, failed)] == [3, 0, 1, 1]
    assert dispatch._tapes == []
    assert adam_step == 5


class AsksTheDevice(TorchDispatchMode):
    """Refuses what a step must not do: read a device scalar on the host, or make a tensor out of host numbers."""

    REFUSED = frozenset({"aten::_local_scalar_dense", "aten::nonzero", "aten::lift_fresh", "aten::equal"})

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().partition(".")[0]
        assert name not in self.REFUSED, f"{name} inside the step"
        return function(*args, **(kwargs or {}))


def whole_step(impl: str) -> None:
    a = arena()
    counters, flag = torch.zeros(3, dtype=torch.int64, device=DEVICE), torch.zeros((), device=DEVICE)
    scale = torch.ones((), device=DEVICE)
    gradient = torch.empty_like(a["g"])
    with AsksTheDevice():
        for kind in losses.GAN_KINDS:
            gan_loss(a["g"], (0.0, 1.0), 0.5, gradient, kind=kind, scale=scale, impl=impl)
        l1_tanh_loss(a["p"], a["m"], a["g"], 100.0, gradient, scale=scale, impl=impl)
        found_inf_(a["g"], flag, impl=impl)
        adam(**a, beta1=0.5, beta2=0.999, scale=scale, found_inf=flag, impl=impl)
        advance(counters, a["step"], 4, flag, impl=impl)


def test_references_never_ask_the_device():
    whole_step("reference")


@needs_triton
def test_launches_never_ask_the_device():
    """The host's part of the Triton path: the interpreter itself does ask, so nothing is started."""
    with recorded(run=False) as tape:
        whole_step("triton")
    assert len(tape) == 9


@needs_triton
def test_kernels_that_can_are_asked_to_overlap_inside_the_block_alone():
    parts, out = torch.zeros(2, 4, 8, device=DEVICE), torch.zeros(4, 8, device=DEVICE)
    with recorded(run=False) as tape:
        sum_splits(parts, out, impl="triton")
        with overlapping():
            sum_splits(parts, out, impl="triton")
            adam(**arena(), beta1=0.5, beta2=0.999, impl="triton")
            with overlapping(False):
                sum_splits(parts, out, impl="triton")
        sum_splits(parts, out, impl="triton")
    asked = [dict(launch.options).get("launch_pdl", False) for launch in tape]
    assert asked == [False, True, False, False, False]
    assert dict(tape[1].options)["OVERLAP"] is True


@needs_triton
def test_a_tape_that_starts_nothing():
    a = arena()
    before = a["p"].clone()
    with recorded(run=False) as dry, recorded() as inner:
        adam(**a, beta1=0.5, beta2=0.999, impl="triton")
    assert torch.equal(a["p"], before)
    with FakeTensorMode(), recorded(run=False) as fake:
        adam(**arena(), beta1=0.5, beta2=0.999, impl="triton")
    with recorded() as tape:
        adam(**a, beta1=0.5, beta2=0.999, impl="triton")
    assert not torch.equal(a["p"], before)
    assert dry == inner == fake  # without addresses
    assert fake[0].arguments[0] == (0, *tape[0].arguments[0][1:])
    assert fake[0][3:] == tape[0][3:]


@pytest.mark.parametrize("asks", [lambda x: x.item(), bool, lambda x: torch.tensor([1.0, 2.0])])
def test_the_watch_itself_notices(asks):
    with AsksTheDevice(), pytest.raises(AssertionError, match="inside the step"):
        asks(torch.ones(()))


WITHOUT_TRITON = """
import importlib, pkgutil, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
import torch
import fastpix2pix.kernels as package
for module in pkgutil.iter_modules(package.__path__):
    importlib.import_module(f"{package.__name__}.{module.name}")
from fastpix2pix.kernels.dispatch import NotSupported
from fastpix2pix.kernels.losses import gan_loss
logits = torch.zeros(8)
for impl in ("auto", "reference"):
    print(gan_loss(logits, (0.0, 1.0), 1.0, torch.empty(8), impl=impl).tolist())
try:
    gan_loss(logits, (0.0, 1.0), 1.0, torch.empty(8), impl="triton")
except NotSupported as refusal:
    print(refusal)
"""


def test_package_works_without_triton():
    environment = {k: v for k, v in os.environ.items() if k != "FASTPIX2PIX_IMPL"}
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    auto, reference, refusal = run.stdout.splitlines()
    assert auto == reference == "[0.6931471824645996, 0.6931471824645996]"
    assert refusal.startswith("losses: impl = triton cannot run: triton is not installed;")


@needs_triton
def test_any_device_will_do_for_what_is_only_recorded():
    assert dispatch.environment_reasons("cpu") or dispatch.environment_reasons("cuda")  # interpreted or not
    with recorded(run=False):
        assert dispatch.environment_reasons("cpu") == dispatch.environment_reasons("cuda") == []


def test_plans_are_for_the_gpu_at_hand(monkeypatch):
    """An A100's 108 multiprocessors; while launches are only recorded no GPU is asked."""
    card = SimpleNamespace(multi_processor_count=108)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    cuda = torch.device("cuda")
    assert (dispatch.processors(cuda), dispatch.processors(torch.device("cpu"))) == (108, dispatch.PROCESSORS)
    with recorded(run=False):
        assert dispatch.processors(cuda) == dispatch.PROCESSORS
    config = train_config(batch=64, step="explicit", device="cpu")
    plans = [
        build(config, dispatch.processors(cuda))["blocks.3.conv.weight", 128] for build in (static_plans, candidates_of)
    ]
    assert plans[0].wgrad == plans[1].wgrad[0] and plans[0].wgrad.splits == 5
