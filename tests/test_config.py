"""Options: defaults, refusals, and that each is written exactly once."""

import dataclasses
import json

import pytest

from fastpix2pix.config import (
    Build,
    Data,
    Discriminator,
    Form,
    Generator,
    Infer,
    Modes,
    Train,
    build_config,
    from_record,
    train_config,
)
from fastpix2pix.errors import InputError


def test_defaults_are_the_paper():
    config = train_config()
    assert (config.generator.depth, config.generator.ngf, config.n_layers) == (8, 64, 3)
    assert (config.lr, config.beta1, config.beta2, config.lambda_l1, config.batch) == (2e-4, 0.5, 0.999, 100.0, 1)
    assert (config.epochs, config.decay, config.pool) == (200, 100, 0)
    assert (config.data.load, config.data.crop_size, config.data.flip) == (286, 256, True)
    assert config.discriminator() == Discriminator(in_channels=6, ndf=64, n_layers=3, norm="batch")


@pytest.mark.parametrize(("objective", "seen"), [("l1+cgan", 5), ("cgan", 5), ("l1+gan", 3), ("gan", 3)])
def test_unconditional_discriminator_sees_the_image_alone(objective, seen):
    assert train_config(objective=objective, in_channels=2).discriminator().in_channels == seen


def test_flat_names_are_unique():
    names = [f.name for part in (Train, Generator, Data) for f in dataclasses.fields(part)]
    # the discriminator's options in Train are its own; norm is the generator's
    assert len(names) == len(set(names))


def test_load_size_follows_the_crop():
    assert train_config(crop_size=512).data.load == 572
    assert train_config(load_size=256).data.load == 256


def test_record_round_trip_through_json():
    config = train_config(ngf=16, direction="BtoA", decay_epochs=5, epochs=10)
    assert from_record(Train, json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"ngff": 1}, "did you mean ngf"),
        ({"learning_rate": 1}, r"unknown option learning_rate; did you mean lr\?"),
        ({"gan_mode": "lsgan"}, "did you mean gan_loss"),
        ({"n_layers_D": 3}, "did you mean n_layers"),
        ({"zzz": 1}, "allowed are batch, best_by"),
        ({"norm": "group"}, "allowed are batch, instance, none"),
        ({"direction": "AB"}, "allowed are AtoB, BtoA"),
        ({"depth": 4}, "5 to 12"),
        ({"crop_size": 200}, "multiples of 256"),
        ({"load_size": 255}, "at least crop_size"),
        ({"n_layers": 6}, r"0 \(PixelGAN\) to 5"),
        ({"ngf": 0}, "at least 1"),
        ({"batch": 0}, "at least 1"),
        ({"lr": 0.0}, "positive"),
        ({"beta1": 1.0}, r"\[0, 1\)"),
        ({"ema": -0.1}, r"\[0, 1\)"),
        ({"pool": -1}, "not be negative"),
        ({"decay_epochs": 300}, "between 0 and epochs = 200"),
        ({"workers": -1}, "not be negative"),
        ({"graph": "on"}, "captures step = explicit; step is auto"),
        ({"impl": "triton"}, "chooses the kernels of step = explicit"),
        ({"seed": 2**63}, "seed"),
        ({"holdout": -1}, "not be negative"),
        ({"objective": "gan+l1"}, "l1\\+gan"),
        ({"direction": 1}, "allowed are AtoB, BtoA"),
        ({"epochs": "3"}, "epochs = '3': must be a whole number"),
        ({"epochs": 2.5}, "epochs = 2.5: must be a whole number"),
        ({"load_size": True}, "load_size = True: must be a whole number"),
        ({"lr": None}, "lr = None: must be a number"),
        ({"flip": "no"}, "flip = 'no': must be True or False"),
    ],
)
def test_refusals_say_what_is_allowed(options, match):
    with pytest.raises(InputError, match=match):
        train_config(**options)


def test_a_whole_number_is_a_number_too():
    assert train_config(lr=1, load_size=None).lr == 1


def test_other_refusals():
    with pytest.raises(InputError, match="seed"):
        Modes(seed=-1)
    with pytest.raises(InputError, match="off, fixed, random"):
        Infer(noise="on")
    with pytest.raises(InputError, match="batch"):
        Infer(batch=0)
    with pytest.raises(InputError, match="unknown Train fields colour"):
        from_record(Train, {"colour": 1})


def test_sizes_and_batches_of_a_build():
    assert Build().sizes == ()
    assert Build().batches == (1,)
    assert Build(size="256").sizes == ((256, 256),)
    assert Build(size="256x512").sizes == ((256, 512),)
    assert Build(size="256, 512, 512x1024").sizes == ((256, 256), (512, 512), (512, 1024))
    assert Build(batch="1,4,8").batches == (1, 4, 8)
    assert build_config(size=512, batch=2).sizes == ((512, 512),)  # numbers, in Python


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"size": "256x"}, "whole numbers of at least 1"),
        ({"size": "0"}, "whole numbers of at least 1"),
        ({"size": "256,512"}, "smallest,usual,largest"),
        ({"size": "1x2x3"}, "256x512"),
        ({"size": "512,256,1024"}, "the smallest first"),
        ({"size": "256x512,512x256,512x512"}, "the smallest first"),
        ({"batch": "1,2"}, "one number and smallest,usual,largest"),
        ({"batch": "two"}, "whole numbers"),
        ({"batch": ""}, "one number"),
        ({"precision": "fp4"}, "allowed are auto, fp32, fp16, bf16, int8, fp8"),
        ({"target": "openvino"}, "allowed are onnx, tensorrt, tensorrt-rtx"),
        ({"workspace": 0}, "positive"),
        ({"max_difference": -1.0}, "positive"),
        ({"gate_images": 0}, "at least 1"),
        ({"seed": -1}, r"\[0, 2\*\*63\)"),
        ({"capability": "sm80"}, "did you mean capabilities"),
    ],
)
def test_bad_options_of_a_build(options, match):
    with pytest.raises(InputError, match=match):
        build_config(**options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"height": None}, "give both sides or none"),
        ({"batch": 0}, "at least 1"),
        ({"precision": "auto"}, "allowed are fp32"),
    ],
)
def test_bad_forms(options, match):
    with pytest.raises(InputError, match=match):
        Form(**options)
