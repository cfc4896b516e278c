"""Pictures hold what they should, and say what is missing where they cannot be drawn."""

import sys

import pytest
import torch

from nfkernels.training import DataError
from nfkernels.training.plots import image_grid, loss_curve

Image = pytest.importorskip("PIL.Image")


def test_grid_shows_every_image_in_its_place(tmp_path):
    images = torch.zeros(6, 1, 2, 2, dtype=torch.uint8)
    images[4] = 16  # white
    images[5, 0, 0, 1] = 8
    image_grid(tmp_path / "grid.png", images, grey_levels=17, columns=3)
    picture = Image.open(tmp_path / "grid.png")
    assert picture.mode == "L"
    width, height = picture.size
    cell = (width - 2) // 3
    assert (width, height) == (3 * cell + 2, 2 * cell + 2)
    assert 600 < width < 680

    def value(index, row, column):
        factor = (cell - 2) // 2
        left, top = 2 + index % 3 * cell, 2 + index // 3 * cell
        return picture.getpixel((left + factor * column + factor // 2, top + factor * row + factor // 2))

    assert [value(index, 0, 0) for index in range(6)] == [0, 0, 0, 0, 255, 0]
    assert (value(5, 0, 1), value(5, 1, 0)) == (128, 0)
    assert picture.getpixel((cell // 2, 0)) == 255  # the gap


def test_colour_and_large_grids(tmp_path):
    images = torch.zeros(1, 3, 700, 4, dtype=torch.uint8)
    images[0, 0] = 255
    image_grid(tmp_path / "grid.png", images)
    picture = Image.open(tmp_path / "grid.png")
    assert picture.mode == "RGB"
    assert picture.getpixel((picture.width // 2, picture.height // 2)) == (255, 0, 0)
    for wrong in (images[0], images[:0], torch.zeros(1, 0, 4, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="expected"):
            image_grid(tmp_path / "wrong.png", wrong)
    assert not (tmp_path / "wrong.png").exists()


@pytest.mark.parametrize(("channels", "mode"), [(2, "L"), (4, "RGB"), (5, "RGB")])
def test_other_numbers_of_channels_are_drawn_too(tmp_path, channels, mode):
    images = torch.zeros(1, channels, 4, 4, dtype=torch.uint8)
    images[0, 0] = 255
    image_grid(tmp_path / "grid.png", images)
    picture = Image.open(tmp_path / "grid.png")
    assert picture.mode == mode
    assert picture.getpixel((picture.width // 2, picture.height // 2)) == (255 if mode == "L" else (255, 0, 0))


def test_loss_curve_is_a_picture_of_the_losses(tmp_path):
    pytest.importorskip("matplotlib")
    history = [{"step": 10 * k, "bpd": 4.0 / k + 2} for k in range(1, 40)]
    loss_curve(tmp_path / "a.png", history, baselines={"uniform": 4.1})
    history += [{"step": 200, "validation_bpd": 2.5}, {"step": 300, "validation_bpd": None}]
    loss_curve(tmp_path / "b.png", history, baselines={"uniform": 4.1}, best=(200, 2.5), title="t")
    one, other = (Image.open(tmp_path / name) for name in ("a.png", "b.png"))
    assert one.size == other.size
    assert one.tobytes() != other.tobytes()
    loss_curve(tmp_path / "empty.png", [])
    assert Image.open(tmp_path / "empty.png").size == one.size


@pytest.mark.parametrize("module", ["matplotlib", "PIL.Image"])
def test_missing_packages_are_named_with_the_command_that_brings_them(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    draw = {
        "matplotlib": lambda: loss_curve(tmp_path / "x.png", []),
        "PIL.Image": lambda: image_grid(tmp_path / "x.png", torch.zeros(1, 1, 2, 2, dtype=torch.uint8)),
    }[module]
    with pytest.raises(DataError, match=r'pip install "nfkernels\[train\]"'):
        draw()
