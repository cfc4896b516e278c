"""Presets: options that there are, the published architectures, and scales that never come near zero."""

import pytest
import torch

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


def test_names_of_scale_maps_are_those_there_are():
    assert set(SCALE_MAPS) == set(SCALE_MAP_NAMES)


def test_the_digits_preset_is_what_happens_without_one():
    for option, value in PRESETS["glow-digits"].items():
        assert (option, value) == ("data", "digits") or TRAIN[option].default == value
