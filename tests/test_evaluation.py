import json
import math
import re
import tarfile
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from fastpix2pix import evaluation
from fastpix2pix.config import Generator, Modes
from fastpix2pix.data.batches import Batch
from fastpix2pix.data.images import read_image, write_image
from fastpix2pix.data.loader import validation_batches
from fastpix2pix.data.pairs import find_pairs
from fastpix2pix.errors import InputError
from fastpix2pix.evaluation import Evaluation, evaluate, evaluate_network, image_metrics, match_at_1
from fastpix2pix.model import build_generator
from fastpix2pix.model.weights import save_network
from fastpix2pix.runtime.load import load

CPU = torch.device("cpu")


def network(**options):
    torch.manual_seed(0)
    net = build_generator(Generator(**({"depth": 5, "ngf": 4} | options)))
    with torch.no_grad():
        net.up[-1].conv.weight.mul_(10)
    return net.eval()


class Copy(torch.nn.Module):
    """A generator whose output is its input, or what `change` makes of it."""

    def __init__(self, change=lambda x: x):
        super().__init__()
        self.change = change

    def forward(self, x, modes=None, first=0):
        return self.change(x)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def pictures(count: int, side: int = 32, seed: int = 0) -> torch.Tensor:
    return (noise(count, 3, side, side, seed=seed) * 256).to(torch.uint8)


@pytest.fixture
def data(tmp_path):
    """Four A|B pairs of 40x64 for validation, of which the last has no whole-number scale to 32x32."""
    folder = tmp_path / "data" / "val"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(4):
        write_image(folder / f"{i}.png", rng.integers(0, 256, (40 + i, 64 + 2 * i, 3), dtype=np.uint8))
    return folder.parent


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.safetensors"
    record = {"norm_stats": "running", "noise": "off"}
    save_network(path, network(), direction="BtoA", size=32, modes=record)
    return path


# The metrics


def gaussian_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. 2004 in float64, valid windows only, mean over channels: [C, H, W] in [0, 1]."""
    window = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2

    def mean(z):
        return (np.lib.stride_tricks.sliding_window_view(z, (11, 11), (1, 2)) * window).sum((-2, -1))

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return float(((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())


@pytest.mark.parametrize("channels, height, width", [(3, 32, 32), (1, 32, 48), (3, 13, 12)])
@pytest.mark.parametrize("count", [1, 3])
def test_metrics_equal_their_formulas(count, channels, height, width):
    y = noise(count, channels, height, width)
    x = (y + 0.3 * (noise(count, channels, height, width, seed=1) - 0.5)).clamp(0, 1)
    l1, psnr, ssim = image_metrics(x, y)
    for i in range(count):
        a, b = x[i].double().numpy(), y[i].double().numpy()
        assert l1[i].item() == pytest.approx(np.abs(a - b).mean(), rel=1e-5)
        assert psnr[i].item() == pytest.approx(10 * math.log10(1 / ((a - b) ** 2).mean()), rel=1e-5)
        assert ssim[i].item() == pytest.approx(gaussian_ssim(a, b), abs=1e-5)
    assert ssim.max() < 0.99


def test_a_known_case():
    l1, psnr, ssim = image_metrics(torch.full((1, 3, 16, 16), 0.6), torch.full((1, 3, 16, 16), 0.5))
    assert l1.item() == pytest.approx(0.1, rel=1e-5)
    assert psnr.item() == pytest.approx(20.0, abs=1e-4)
    assert ssim.item() == pytest.approx((2 * 0.6 * 0.5 + 1e-4) / (0.6**2 + 0.5**2 + 1e-4), abs=1e-4)


def test_a_copy_is_perfect():
    x = pictures(3)
    found = evaluate_network(Copy(), [Batch(x[:2], x[:2]), Batch(x[2:], x[2:])], Modes(), CPU)
    assert (found.l1, found.psnr, found.match, found.images) == (0, math.inf, 1, 3)
    assert found.ssim == pytest.approx(1, abs=1e-6)
    assert found.as_dict()["psnr"] is None
    json.dumps(found.as_dict(), allow_nan=False)


# match@1


def test_match_is_found_by_its_own():
    targets = noise(6, 3, 48, 64)
    dim = 0.3 * targets + 0.2 + 0.05 * noise(6, 3, 48, 64, seed=1)  # brightness and contrast do not count
    assert match_at_1(dim, targets).all()
    assert not match_at_1(dim.roll(1, 0), targets).any()
    assert match_at_1(dim[[0, 2, 1, 3, 4, 5]], targets).tolist() == [True, False, False, True, True, True]
    assert not match_at_1(1 - targets, targets).any()  # a negative


def test_a_constant_output_matches_nothing():
    targets = noise(3, 3, 256, 256)
    assert not match_at_1(torch.full_like(targets, 0.1), targets).any()
    outputs = targets.clone()
    outputs[1] = 0.7
    assert match_at_1(outputs, targets).tolist() == [True, False, True]
    targets[2] = 0.3
    assert match_at_1(targets, targets).tolist() == [True, True, False]


def test_one_answer_to_everything_matches_once():
    targets = noise(8, 3, 32, 32)
    assert match_at_1(targets.mean(0, keepdim=True).expand_as(targets), targets).sum() == 1


def test_equal_targets_share_the_first_place():
    targets = noise(3, 1, 40, 40)[[0, 1, 1, 2]]
    assert match_at_1(targets, targets).all()


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_match_in_blocks_of_rows_is_that_of_the_whole(monkeypatch, rows):
    targets = noise(8, 3, 40, 40)[[0, 1, 2, 2, 4, 5, 6, 7]]  # two of them tie
    outputs = (targets + 0.2 * noise(8, 3, 40, 40, seed=1))[[0, 2, 1, 3, 4, 6, 5, 7]]
    whole = match_at_1(outputs, targets)
    assert whole.tolist() == [True, False, False, True, True, False, False, True]
    monkeypatch.setattr(evaluation, "_ROWS", rows)
    assert torch.equal(match_at_1(outputs, targets), whole)


def test_match_of_many_images_holds_few_correlations_at_a_time(monkeypatch):
    largest = []
    amax = torch.Tensor.amax
    monkeypatch.setattr(torch.Tensor, "amax", lambda x, **given: largest.append(x.numel()) or amax(x, **given))
    assert match_at_1(noise(1000, 1, 32, 32), noise(1000, 1, 32, 32)).all()
    assert max(largest) < 1000 * 300


def test_match_is_on_luminance():
    """Two targets of equal luma cannot be told apart; red and blue weigh 0.299 and 0.114."""
    gray = noise(1, 1, 32, 32)
    red = torch.cat([gray, torch.zeros(1, 2, 32, 32)], 1)
    blue = torch.cat([torch.zeros(1, 2, 32, 32), gray.flip(3)], 1)
    both = red + blue  # correlates with red more than with blue
    assert match_at_1(both.repeat(2, 1, 1, 1), torch.cat([red, blue])).tolist() == [True, False]


def test_thumbnails_are_area_averages():
    """Detail finer than a 32nd of the picture does not count."""
    coarse = noise(4, 1, 32, 32).repeat_interleave(4, 2).repeat_interleave(4, 3)
    fine = noise(4, 1, 128, 128, seed=1).sub(0.5).reshape(4, 1, 32, 4, 32, 4)
    fine = (fine - fine.mean((3, 5), keepdim=True)).reshape(4, 1, 128, 128)
    assert match_at_1(coarse + 20 * fine, coarse).all()


# A network


def test_evaluate_network_is_the_mean_of_the_images():
    net, x, y = network(), pictures(3), pictures(3, seed=1)
    found = evaluate_network(net, [Batch(x, y)], Modes(), CPU, ["p", "q", "r"])
    with torch.no_grad():
        outputs = (net(x / 127.5 - 1, Modes()) + 1) / 2
    l1, psnr, ssim = image_metrics(outputs, y / 255)
    assert [row.name for row in found.per_image] == ["p", "q", "r"]
    assert [row.l1 for row in found.per_image] == pytest.approx(l1.tolist(), abs=1e-6)
    assert found.l1 == pytest.approx(l1.mean().item(), abs=1e-6)
    assert found.psnr == pytest.approx(psnr.mean().item(), abs=1e-4)
    assert found.ssim == pytest.approx(ssim.mean().item(), abs=1e-5)
    assert [row.match for row in found.per_image] == match_at_1(outputs, y / 255).tolist()


@pytest.mark.parametrize("modes", [Modes(), Modes("running"), Modes(noise="random", seed=5)])
def test_batches_do_not_change_the_figures(modes):
    net, x, y = network(), pictures(5), pictures(5, seed=1)
    single = evaluate_network(net, [Batch(x[i : i + 1], y[i : i + 1]) for i in range(5)], modes, CPU)
    pairs = evaluate_network(net, lambda: (Batch(x[i : i + 2], y[i : i + 2]) for i in (0, 2, 4)), modes, CPU)
    for one, other in zip(single.per_image, pairs.per_image, strict=True):
        assert (one.name, one.match) == (other.name, other.match)
        assert (one.l1, one.psnr, one.ssim) == pytest.approx((other.l1, other.psnr, other.ssim), abs=1e-4)


def test_evaluation_leaves_no_trace():
    net = network().train()
    net.up[0].eval()  # a part that is frozen stays so
    flags = [module.training for module in net.modules()]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    x = pictures(2)
    evaluate_network(net, [Batch(x, x)], Modes(noise="random"), CPU)
    assert [module.training for module in net.modules()] == flags
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), numbers[0]) and (np.random.get_state()[1] == numbers[1]).all()


def test_training_flags_come_back_after_an_error():
    net = network().train()
    with pytest.raises(InputError, match="multiples of 32"):
        evaluate_network(net, [Batch(pictures(1, 33), pictures(1, 33))], Modes(), CPU)
    assert all(module.training for module in net.modules())


def test_no_images_is_refused():
    with pytest.raises(InputError, match="no validation images"):
        evaluate_network(network(), [], Modes(), CPU)


# A model file and a data folder


def test_evaluate_takes_direction_size_and_modes_from_the_record(model, data):
    seen = []
    found = evaluate(model, data, device="cpu", progress=lambda *p: seen.append(p))
    assert isinstance(found, Evaluation)
    assert (found.images, found.modes) == (4, Modes("running", "off"))
    assert [row.name for row in found.per_image] == ["0", "1", "2", "3"]
    assert seen == [(i, 4) for i in range(1, 5)]
    batches = validation_batches(find_pairs(data, "val"), "BtoA", 3, 3, 32, 1, CPU)
    wanted = evaluate_network(network(), batches, Modes("running"), CPU)
    assert found.l1 == pytest.approx(wanted.l1, abs=1e-6)
    assert found.l1 != pytest.approx(evaluate(model, data, direction="AtoB", device="cpu").l1, abs=1e-4)
    assert found.l1 != pytest.approx(evaluate(model, data, norm_stats="image", noise="off", device="cpu").l1, abs=1e-4)
    assert found.l1 != pytest.approx(evaluate(model, data, size=64, device="cpu").l1, abs=1e-4)
    assert found.l1 == pytest.approx(evaluate(model, data, batch=3, device="cpu").l1, abs=1e-5)


def test_evaluate_agrees_with_the_translator(model, tmp_path):
    """The same picture through `load`: equal but for its rounding to uint8."""
    (tmp_path / "flat/val").mkdir(parents=True)
    pair = np.random.default_rng(3).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    Image.fromarray(pair).save(tmp_path / "flat/val/x.png")
    output = load(model, device="cpu")(pair[:, 32:])
    l1 = np.abs(output / 255 - pair[:, :32] / 255).mean()
    assert evaluate(model, tmp_path / "flat", device="cpu").l1 == pytest.approx(l1, abs=1e-3)


def test_as_dict_is_json(model, data):
    found = evaluate(model, data, device="cpu").as_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["modes"] == {"norm_stats": "running", "noise": "off", "seed": 0}
    assert set(found["per_image"][0]) == {"name", "l1", "psnr", "ssim", "match"}


@pytest.mark.parametrize(
    "options, match",
    [
        ({"size": 48}, r"size = 48: this model takes multiples of 32 pixels"),
        ({"size": 0}, r"size = 0"),
        ({"batch": 0}, r"batch = 0: must be at least 1"),
        ({"direction": "BtoC"}, r"direction = 'BtoC': allowed are AtoB and BtoA"),
        ({"split": "night"}, r"no night pairs"),
        ({"device": "tpu"}, r"device = 'tpu'"),
    ],
)
def test_refused_options(model, data, options, match):
    with pytest.raises(InputError, match=match):
        evaluate(model, data, **({"device": "cpu"} | options))


def test_running_statistics_of_instance_norm_are_refused(tmp_path, data):
    path = tmp_path / "instance.safetensors"
    save_network(path, network(norm="instance"), size=32)
    with pytest.raises(InputError, match="norm_stats = running"):
        evaluate(path, data, norm_stats="running", device="cpu")


def test_the_mean_photo_of_facades(facades):
    """The figures in evaluate's docstring: a blind answer, by which the others are to be judged."""
    batches = validation_batches(find_pairs(facades, "train"), "BtoA", 3, 3, 256, 50, CPU)
    mean = sum(batch.target.double().sum(0) for batch in batches) / 400 / 127.5 - 1
    guess = Copy(lambda x: mean.float().expand_as(x))
    batches = validation_batches(find_pairs(facades, "val"), "BtoA", 3, 3, 256, 10, CPU)
    found = evaluate_network(guess, batches, Modes(), CPU)
    assert found.images == 100
    assert found.l1 == pytest.approx(0.178, abs=5e-4)
    assert found.psnr == pytest.approx(13.41, abs=5e-3)
    assert found.ssim == pytest.approx(0.261, abs=5e-4)
    assert found.match == 0.01


# The pictures


def test_pictures_and_a_page_of_them_worst_first(model, data, tmp_path):
    found = evaluate(model, data, out=tmp_path / "found")
    assert found == evaluate(model, data)
    for folder in ("input", "output", "target"):
        assert sorted(path.name for path in (tmp_path / "found" / folder).iterdir()) == [f"{i}.png" for i in range(4)]
    for row in found.per_image:
        shown = {name: read_image(tmp_path / "found" / name / f"{row.name}.png", 3) for name in ("output", "target")}
        difference = np.abs(shown["output"].astype(float) - shown["target"]).mean() / 255
        assert difference == pytest.approx(row.l1, abs=1 / 255)
    page = (tmp_path / "found" / "index.html").read_text()
    order = sorted(found.per_image, key=lambda row: -row.l1)
    assert re.findall(r'src="output/(\d).png"', page) == [row.name for row in order]
    assert f"{found.l1:.4f}" in page


def test_a_folder_of_pictures_is_replaced_where_that_is_asked_for_and_holds_nothing_else(model, data, tmp_path):
    out = tmp_path / "found"
    evaluate(model, data, out=out)
    with pytest.raises(InputError, match="exists and is not an empty folder"):
        evaluate(model, data, out=out)
    (out / "output" / "left.png").touch()
    evaluate(model, data, out=out, overwrite=True)
    assert not (out / "output" / "left.png").exists()
    (out / "mine.txt").touch()
    with pytest.raises(InputError, match=r"would delete mine.txt, which is no input or output or target or index.html"):
        evaluate(model, data, out=out, overwrite=True)
    with pytest.raises(InputError, match="lies in"):
        evaluate(model, data, out=data / "found")


def test_a_folder_that_is_read_is_not_written_into_however_it_is_spelled(model, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(data)
    for out in ("data/found", "data/../data/found", "link/found"):
        with pytest.raises(InputError, match=f"{out}: lies in data, which is read"):
            evaluate(model, "data", out=out)
    with pytest.raises(InputError, match=r"\.: holds data, which is read"):
        evaluate(model, "data", out=".", overwrite=True)


def test_names_in_archives_stay_below_the_folder(model, data, tmp_path):
    (tmp_path / "shards").mkdir()
    for i, name in enumerate(("a/0", "../../b", "/c", "<d>é")):
        with tarfile.open(tmp_path / "shards" / f"val-{i}.tar", "w") as tar:
            member = tarfile.TarInfo(f"{name}.png")
            member.size = len(content := (data / "val" / "0.png").read_bytes())
            tar.addfile(member, BytesIO(content))
    evaluate(model, tmp_path / "shards", out=tmp_path / "found")
    outputs = sorted(
        str(path.relative_to(tmp_path / "found")) for path in (tmp_path / "found" / "output").rglob("*.png")
    )
    assert outputs == ["output/<d>é.png", "output/a/0.png", "output/b.png", "output/c.png"]
    assert "&lt;d&gt;é" in (tmp_path / "found" / "index.html").read_text()


def test_an_interrupted_evaluation_leaves_no_folder(model, data, tmp_path):
    def stop(done, of):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, data, out=tmp_path / "new" / "found", progress=stop)
    assert not (tmp_path / "new").exists()
