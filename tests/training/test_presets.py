"""Presets: options that there are, the published architectures, and scales that never come near zero."""

import json
from pathlib import Path

import pytest
import torch

from nfkernels import cli
from nfkernels.models import Glow
from nfkernels.reference.scale_map import PRESETS as SCALE_MAP_NAMES
from nfkernels.reference.scale_map import scale
from nfkernels.training import ImageData, Recipe, session
from nfkernels.training.options import GLOW_ARGUMENTS, SCALE_MAPS, TRAIN
from nfkernels.training.presets import PRESETS, SOURCES
from nfkernels.training.recipe import GlowShape


@pytest.mark.parametrize("preset", PRESETS)
def test_every_value_is_what_a_file_could_give(preset):
    for option, value in PRESETS[preset].items():
        assert TRAIN[option].read(value) == value
    Recipe(**{field: PRESETS[preset][field] for field in Recipe.names() if field in PRESETS[preset]})
    assert preset in SOURCES or "data" in PRESETS[preset]


@pytest.mark.parametrize(
    ("preset", "sizes"),
    [
        ("glow-cifar10", (3, 32, 512, [32, 32], 8)),
        ("glow-imagenet32", (3, 48, 512, [32, 32], 8)),
        ("glow-celeba", (6, 32, 512, [256, 256], 5)),
    ],
)
def test_the_published_architectures(preset, sizes):
    options = PRESETS[preset]
    assert tuple(options[name] for name in ("levels", "depth", "width", "size", "n_bits")) == sizes
    shape = GlowShape(**{name: value for name, value in options.items() if name in GLOW_ARGUMENTS})
    images = torch.zeros(1, 3, *options["size"], dtype=torch.uint8)
    data = ImageData(images, None, 2 ** options["n_bits"], None, "none")
    with torch.device("meta"):
        flow = session.build_glow(session.describe_glow(data, shape, conditional=False))
    assert shape.memory == "reversible"
    assert flow.grey_levels == 2 ** options["n_bits"]
    assert len(flow.split_latent(torch.zeros(1, images[0].numel(), device="meta"))) == options["levels"]


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "glow-digits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_scale_is_below_a_thousandth(preset, dtype):
    with torch.device("meta"):
        flow = Glow((1, 4, 4), levels=1, steps=1, hidden=4, scale_map=PRESETS[preset]["scale_map"])
    maps = {module.scale_map for module in flow.modules() if hasattr(module, "scale_map")}
    assert maps
    raw = torch.linspace(-200, 200, 40001, dtype=dtype)
    for scale_map in maps:
        assert float(scale(scale_map, raw).min()) >= 1e-3


@pytest.mark.usefixtures("elsewhere")
def test_a_preset_trains_what_it_says(capsys):
    """Smaller, but with all that the large presets bring: bfloat16, rebuilt activations, Adamax, flips."""
    import numpy

    for package in ("matplotlib", "PIL"):
        pytest.importorskip(package)
    images = numpy.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=numpy.uint8)
    numpy.savez("set.npz", images=images)
    small = ["--depth", "1", "--width", "8", "--steps", "4", "--batch-size", "4", "--validate-every", "2"]
    arguments = ["--preset", "glow-cifar10", "--data", "set.npz", *small, "--threads", "1", "--quiet", "--out", "run"]
    assert cli.main(["train", *arguments]) == 0
    assert "3 levels of 1 step, width 8" in capsys.readouterr().out
    config = json.loads(Path("run/config.json").read_text())
    assert (config["model"]["memory"], config["model"]["scale_map"]) == ("reversible", "nflows")
    recipe = config["recipe"]
    assert (recipe["precision"], recipe["optimizer"], recipe["flip"]) == ("bfloat16", "adamax", True)
    assert cli.main(["evaluate", "run", "--draws", "1", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["precision"] == "bfloat16"
    assert 0 < facts["round_trip_error"] < 1e-2


def test_names_of_scale_maps_are_those_there_are():
    assert set(SCALE_MAPS) == set(SCALE_MAP_NAMES)


def test_the_digits_preset_is_what_happens_without_one():
    for option, value in PRESETS["glow-digits"].items():
        assert (option, value) == ("data", "digits") or TRAIN[option].default == value
