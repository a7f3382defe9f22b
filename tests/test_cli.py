"""Every command: what it prints where, its exit code, and what it leaves behind on bad input."""

import dataclasses
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from fastpix2pix import cli
from fastpix2pix.commands import Command, DataCommand, as_typed
from fastpix2pix.config import Bench, Build, Data, Generator, Infer, Stream, Train, train_config
from fastpix2pix.data.images import read_image, write_image
from fastpix2pix.model import build_generator
from fastpix2pix.model.weights import save_network
from fastpix2pix.option_check import _options, check_options
from fastpix2pix.other_names import _OTHER_NAMES
from fastpix2pix.training.record import recorded_config

TINY = [
    *("--crop-size=32", "--depth=5", "--ngf=4", "--ndf=4", "--n-layers=1", "--workers=0", "--device=cpu"),
    *("--no-tensorboard", "--epochs=1", "--batch=2"),
]
COMMANDS = [
    *("demo", "train", "eval", "infer", "build", "convert", "data", "tune", "bench", "doctor"),
    *("data check", "data combine", "data shard", "data demo"),
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2), ("test", 1)):
        (root / split).mkdir()
        for i in range(count):
            write_image(root / split / f"{i}.png", rng.integers(0, 255, (64, 128, 3), dtype=np.uint8))
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "g.safetensors"
    save_network(path, build_generator(Generator(depth=5, ngf=4)), direction="BtoA", size=32)
    return path


def run(*argv: object) -> int:
    """The command in this process; usage errors exit by themselves."""
    try:
        return cli.main([str(a) for a in argv])
    except SystemExit as stop:
        return int(stop.code or 0)


def start(*argv: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "fastpix2pix.cli", *map(str, argv)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_goes_to_stdout_and_explains_each_option(command, capsys):
    assert run(*command.split(), "--help") == 0
    out, err = capsys.readouterr()
    assert "usage: fastpix2pix " + command in out
    assert err == ""


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "data"])
def test_every_option_of_the_help_is_a_known_one(command, capsys):
    run(command.split()[0], *command.split()[1:], "--help")
    found = re.findall(r"(?m)^[│ ] (--[a-z][a-z0-9-]*)(?:, (--[a-z0-9-]+))?", capsys.readouterr().out)
    words = [word for pair in found for word in pair if word]
    assert words
    check_options([*command.split(), *words, *("--" + word[2:].replace("-", "_") for word in words)])


def test_other_names_are_of_options_that_exist():
    commands = *get_args(Command), *get_args(DataCommand)
    options = {name for command in commands for name in dict(_options(get_args(command)[0]))}
    assert set(_OTHER_NAMES.values()) <= options
    assert not options & set(_OTHER_NAMES)


def test_required_words_have_no_default(capsys):
    run("infer", "--help")
    assert "(default: )" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "configs"),
    [("train", (Train, Generator, Data)), ("infer", (Infer, Stream)), ("build", (Build,)), ("bench", (Bench,))],
)
def test_every_field_is_an_option_with_help(command, configs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    run(command, "--help")
    words = capsys.readouterr().out.split()
    for config in configs:
        source = Path(sys.modules[config.__module__].__file__).read_text().splitlines()
        for field in dataclasses.fields(config):
            if field.name in ("generator", "data"):
                continue
            option = {"capabilities": "for"}.get(field.name, field.name.replace("_", "-"))
            assert any(w.startswith(f"--{option}") for w in words), field.name
            line = next(x for x in source if x.startswith(f"    {field.name}: ") and (" = " in x))
            assert "  # " in line, f"{field.name} has no comment, so no help"


def test_resumed_command_line_starts_from_the_recorded_options(pairs, tmp_path):
    assert run("train", pairs, "--out", tmp_path / "run", *TINY, "--direction=BtoA") == 0
    command = cli.parse(["train", str(pairs), "--out", str(tmp_path / "run"), "--resume", "--epochs=3"])
    assert command.training == dataclasses.replace(recorded_config(tmp_path / "run"), epochs=3)
    assert command.training.data.direction == "BtoA"
    assert command.resume
    assert command() == 0


def test_train_eval_infer_convert(pairs, tmp_path, capsys):
    out = tmp_path / "run"
    assert run("train", pairs, "--out", out, *TINY) == 0
    assert run("eval", out, pairs, "--json", "-") == 0
    stdout, stderr = capsys.readouterr()
    found = json.loads(stdout)  # nothing else there
    assert set(found) >= {"l1", "psnr", "ssim", "match", "images", "modes", "per_image"}
    assert found["images"] == 2
    assert run("eval", out, pairs, "--split=test", "--json", tmp_path / "test.json") == 0
    assert json.loads((tmp_path / "test.json").read_text())["images"] == 1
    assert "image+off" in stderr
    assert "running+off" in stderr
    assert "best:" in stderr
    assert run("infer", out, pairs / "val", tmp_path / "pictures", "--direction=AtoB", "--suffix=jpg") == 0
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == ["0.jpg", "1.jpg"]
    assert read_image(tmp_path / "pictures" / "0.jpg").shape == (64, 64, 3)
    pth, back = tmp_path / "latest_net_G.pth", tmp_path / "back.safetensors"
    assert run("convert", out / "best.safetensors", pth) == 0
    assert run("convert", pth, back) == 0
    for name, source in (("a.png", out), ("b.png", back)):
        options = ("--norm-stats=image", "--noise=off", "--direction=AtoB")
        assert run("infer", source, pairs / "val" / "0.png", tmp_path / name, *options) == 0
    assert np.array_equal(read_image(tmp_path / "a.png"), read_image(tmp_path / "b.png"))
    assert capsys.readouterr().out == ""


BAD = [  # arguments with {d}ata, {m}odel and {t}mp folder; exit code; what stderr says
    ("train {t}/nowhere --out {t}/run", 2, "nowhere: no such folder"),
    ("train {t} --out {t}/run", 2, "broken pairs"),
    ("train {m} --out {t}/run", 2, "accepted: ROOT/"),
    ("train {d} --out {t}/run --depth 4", 2, "5 to 12"),
    ("train {d} --out {t}/run --crop-size 33 --depth 5", 2, "multiples of 32"),
    ("train {d} --out {t}/run --ngff 4", 2, "error: unknown option --ngff: did you mean --ngf? (fastpix2pix train"),
    ("train {d} --learning-rate=1e-3", 2, "unknown option --learning-rate: did you mean --lr? (fastpix2pix train --h"),
    ("train --dataroot {d} --out {t}/run", 2, "unknown option --dataroot: did you mean DATA without a name? (fast"),
    ("train {d} --out {t}/run --no-dropout", 2, "unknown option --no-dropout: did you mean --dropout?"),
    ("eval {m} {d} --batch_size 3", 2, "unknown option --batch_size: did you mean --batch? (fastpix2pix eval --h"),
    ("data check {d} --learning-rate 3", 2, "unknown option --learning-rate (fastpix2pix data check --help lists all)"),
    ("train {d} --out {t}/run --init {t}/none.pth", 2, "none.pth: no such file"),
    ("demo --out {t}/demo --minutes 0", 2, "error: --minutes 0.0: must be positive"),
    ("train {d} --out {t}/run --norm group", 2, "instance"),
    ("train {d} --out {t}/run --epochs many", 2, "many"),
    ("train {d} --out {d}", 2, "--resume"),
    ("train {d} --out {t}/run --resume", 2, "no run folder"),
    ("train {d} --out {t}/run --device cuda:99", 3, "cuda"),
    ("train {d} --out {t}/run --device tpu", 2, "allowed are auto, cpu"),
    ("train {d}", 2, "--out"),
    ("eval {t}/nothing {d}", 2, "no such file"),
    ("eval {m} {t}/nowhere", 2, "nowhere: no such folder"),
    ("eval {m} {d} --size 33", 2, "multiples of 32"),
    ("eval {t}/text.safetensors {d}", 2, "not a safetensors file"),
    ("infer {m} {d}/val", 2, "at least one source and, last"),
    ("infer {m} {t}/none.png {t}/out.png", 2, "none.png"),
    ("infer {m} {t}/text.png {t}/out.png", 2, "text.png: not an image of a known format"),
    ("infer {m} {t}/empty.png {t}/out.png", 2, "empty.png"),
    ("infer {m} {t}/cut.png {t}/out.png", 2, "cut.png"),
    ("infer {m} {t}/huge.png {t}/out.png", 2, "limit of 67.11 megapixels"),
    ("infer {m} {d}/val {t}/out.png", 2, "out.png"),
    ("infer {m} {d}/val/0.png {d}/val/0.png", 2, "0.png"),
    ("infer {m} {d}/val/0.png {t}/out.png --norm-stats mean", 2, "running"),
    ("infer {m} {d}/val/0.png {t}/out.mp4", 2, "0.png: one image, where a video is wanted"),
    ("infer {m} {d}/val/0.png {t}/out.png --live", 2, "error: --live: is for videos"),
    (
        "infer {m} {d}/val/0.png {t}/out.png --fit tile",
        2,
        "--fit tile: a tile has other image statistics than the whole; use --norm-stats running, or --fit pad",
    ),
    ("infer {m} {d}/val/0.png {t}/out.png --tile 64", 2, "--tile 64: side of the squares of --fit tile; fit is pad"),
    ("eval {m} {t}/in.mp4", 2, "in.mp4: a video has no pairs; with --video its flicker is measured"),
    ("eval {m} {d} --steady 0.5", 2, "--steady 0.5: is for a video"),
    ("eval {m} {d} --video --batch 2", 2, "--batch 2: is for pairs"),
    ("infer {m} {d}/val/0.png {t}/out.png --size 0", 2, "error: --size 0: must be"),
    ("infer {t}/g.pth {d}/val/0.png {t}/out.png", 2, "g.pth: no such file"),
    ("convert {m} {t}/out.onnx", 2, "allowed are .pth -> .safetensors"),
    ("convert {t}/text.pth {t}/out.safetensors", 2, "text.pth: empty or not a PyTorch file"),
    ("convert {m} {m}", 2, "allowed are"),
    ("data check {t}/nowhere", 2, "no such folder"),
    ("data combine {t}/a {t}/b --out {t}/ab", 2, "no such folder"),
    ("data demo --out {d}", 2, "not an empty folder"),
    ("data demo --out {t}/demo --size 3", 2, "32"),
    ("demo --out {d}", 2, "not an empty folder"),
    ("", 2, "Missing subcommand"),
    ("paint", 2, "paint"),
]


@pytest.mark.parametrize(("line", "code", "says"), BAD, ids=[b[0] or "nothing" for b in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(line, code, says, pairs, model, tmp_path, capsys):
    for name in ("text.png", "text.safetensors", "text.pth"):
        (tmp_path / name).write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes((pairs / "val" / "0.png").read_bytes()[:2000])
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    assert run(*line.format(d=pairs, m=model, t=tmp_path).split()) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert says in " ".join(err.replace("│", " ").split())
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_ctrl_c_between_images_is_said(model, pairs, tmp_path, monkeypatch, capsys):
    def interrupted(path, channels):
        os.kill(os.getpid(), signal.SIGINT)
        return read_image(path, channels)

    monkeypatch.setattr("fastpix2pix.runtime.translate.read_image", interrupted)
    assert run("infer", model, pairs / "val" / "0.png", tmp_path / "out.png") == 130
    assert "interrupted after " in capsys.readouterr().err


def test_options_of_errors_are_shown_as_they_are_typed():
    table = {
        "norm_stats = 'mean': allowed are image, running": "--norm-stats 'mean': allowed are image, running",
        "out.png exists; use overwrite = True": "out.png exists; use --overwrite",
        "cache = False, capabilities = sm80": "--no-cache, --for sm80",
        "channels = 3: images have 1, my_size = 3": "channels = 3: images have 1, my_size = 3",  # no options
    }
    assert {text: as_typed(text) for text in table} == table


def test_a_folder_with_a_broken_image_is_exit_code_4(model, pairs, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name in ("a", "c"):
        (tmp_path / f"in/{name}.png").write_bytes((pairs / "val/0.png").read_bytes())
    (tmp_path / "in/b.png").write_bytes(b"broken")
    assert run("infer", model, tmp_path / "in", tmp_path / "out") == 4
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "c.png"]
    err = capsys.readouterr().err
    assert f"left out: {tmp_path}/in/b.png: not an image of a known format" in err
    assert "2 images in" in err and "; 1 could not be read" in err


def test_pairs_translated_whole_are_said(model, tmp_path, capsys):
    write_image(tmp_path / "in" / "pair.png", np.zeros((32, 64, 3), np.uint8))
    assert run("infer", model, tmp_path / "in", tmp_path / "out") == 0
    said = "1 of 1 images could be A|B pairs (64x32): --direction BtoA translates their input half\n"
    assert said in capsys.readouterr().err


def test_debug_shows_the_traceback(pairs, tmp_path):
    process = start("--debug", "eval", tmp_path / "nothing", pairs)
    _, err = process.communicate()
    assert process.returncode == 2
    assert "Traceback" in err
    assert "InputError" in err
    assert err.endswith(
        f"error: {tmp_path}/nothing: no such file; a model is a run folder, a .safetensors file or a junyanz .pth\n"
    )


def test_unexpected_error_is_a_bug_with_traceback(pairs, monkeypatch):
    monkeypatch.setattr("fastpix2pix.doctor.examine", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("doctor")


def test_data_check_says_no_with_exit_code_4(tmp_path, capsys):
    (tmp_path / "train").mkdir()
    write_image(tmp_path / "train" / "<b>good&.png", np.zeros((64, 128, 3), np.uint8))
    assert run("data", "check", tmp_path) == 0
    write_image(tmp_path / "train" / "odd.png", np.zeros((64, 129, 3), np.uint8))
    (tmp_path / "train" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    capsys.readouterr()
    assert run("data", "check", tmp_path) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert "odd.png" in err
    assert "broken.jpg" in err
    assert "<b>good&.png" not in err


def test_data_demo_and_combine_and_check(tmp_path, capsys):
    assert run("data", "demo", "--out", tmp_path / "set", "--train=2", "--val=1", "--size=64") == 0
    assert run("data", "check", tmp_path / "set") == 0
    for side, half in (("a", slice(0, 64)), ("b", slice(64, 128))):
        for path in (tmp_path / "set" / "train").iterdir():
            (tmp_path / side).mkdir(exist_ok=True)
            write_image(tmp_path / side / path.name, read_image(path)[:, half])
    assert run("data", "combine", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "ab") == 0
    for path in (tmp_path / "set" / "train").iterdir():
        assert np.array_equal(read_image(path), read_image(tmp_path / "ab" / path.name))
    assert capsys.readouterr().out == ""


def test_names_are_escaped_in_the_page(pairs, tmp_path):
    out = tmp_path / "<script>alert(1)<"
    assert run("train", pairs, "--out", out, *TINY) == 0
    page = (out / "index.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_full_disk_is_exit_code_3_and_leaves_no_half_checkpoint(pairs, tmp_path):
    def limit() -> None:  # larger files fail as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    process = start("train", pairs, "--out", tmp_path / "run", *TINY, preexec_fn=limit)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 3, err
    assert out == ""
    assert "error: cannot write" in err
    assert "Traceback" not in err
    assert list((tmp_path / "run").glob("checkpoints/*")) == []
    assert [p.name for p in (tmp_path / "run").iterdir() if "tmp" in p.name] == []


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
def test_full_disk_for_a_report_is_exit_code_3(capsys):
    assert run("doctor", "--json", "/dev/full") == 3
    assert "No space left" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("doctor", "--json", "-"), ("train", "--help")], ids=["JSON", "help"])
def test_closed_pipe_ends_quietly(arguments):
    process = start(*arguments)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=300) == 0
    assert "Broken" not in err


def test_doctor_names_what_auto_means(capsys):
    assert run("doctor", "--json", "-") == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert set(found["auto"]) == {"device", "precision", "loader", "step", "backend"}
    assert set(found["backends"]) == {"torch", "triton", "onnxruntime", "tensorrt", "tensorrt-rtx"}
    assert {p["name"] for p in found["parts"]} >= {"dali", "triton", "torchmetrics"}
    assert all(p["usable"] or p["todo"] for p in found["parts"])
    assert "torch" in err


def test_out_of_memory_is_an_environment_failure(capsys, monkeypatch):
    def fail():
        raise MemoryError

    monkeypatch.setattr("fastpix2pix.doctor.examine", fail)
    assert run("doctor") == 3
    assert "out of memory" in capsys.readouterr().err


def test_python_and_command_line_have_the_same_options():
    assert train_config(ngf=16).generator.ngf == 16
    command = cli.parse(["train", "d", "--out", "o", "--ngf", "16"])
    assert command.training == train_config(ngf=16)
