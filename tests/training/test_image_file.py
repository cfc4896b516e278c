"""Grids of images as files: the pixels of `plot.image_grid`, one byte for each or three, whole or not there."""

import sys

import numpy
import pytest
import torch

from nfkernels.plot.images import tiles
from nfkernels.training import DataError
from nfkernels.training.image_file import write_grid

Image = pytest.importorskip("PIL.Image")


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "L"), (3, "RGB"), (4, "RGB"), (5, "RGB")])
def test_the_file_holds_the_pixels(tmp_path, channels, mode):
    images = torch.randint(17, (6, channels, 4, 3), dtype=torch.uint8)
    write_grid(tmp_path / "grid.png", images, grey_levels=17, columns=2)
    picture = Image.open(tmp_path / "grid.png")
    assert picture.mode == mode
    assert (numpy.asarray(picture) == tiles(images, grey_levels=17, columns=2).numpy()).all()


def test_other_shapes_leave_no_file(tmp_path):
    images = torch.zeros(1, 3, 700, 4, dtype=torch.uint8)
    for wrong in (images[0], images[:0], torch.zeros(1, 0, 4, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="expected"):
            write_grid(tmp_path / "wrong.png", wrong)
    assert not list(tmp_path.iterdir())


def test_a_missing_pillow_is_named_with_the_command_that_brings_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(DataError, match=r'pip install "nfkernels\[train\]"'):
        write_grid(tmp_path / "x.png", torch.zeros(1, 1, 2, 2, dtype=torch.uint8))
