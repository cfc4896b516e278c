"""Image grids and interpolations: every pixel in its place."""

import numpy
import pytest
import torch

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

from figures import drawn, pictures, texts  # noqa: E402

from nfkernels import plot  # noqa: E402
from nfkernels.plot.images import tiles  # noqa: E402


@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 5, 3), (1, 28, 28), (3, 700, 3), (2, 8, 8), (5, 8, 8)])
@pytest.mark.parametrize("count", [1, 7])
def test_what_is_saved_is_exactly_the_grid(tmp_path, shape, count):
    images = pictures(count, shape, levels=32)
    pixels = tiles(images, grey_levels=32)
    figure = plot.image_grid(images, grey_levels=32)
    plot.save(figure, tmp_path / "grid.png")
    found = numpy.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    expected = pixels.numpy() if pixels.dim() == 3 else pixels[..., None].expand(-1, -1, 3).numpy()
    assert found.shape == expected.shape
    assert (found == expected).all()
    assert (figure.axes[0].images[0].get_array() == expected).all()


def test_every_image_is_in_its_place():
    images = torch.zeros(6, 1, 2, 2, dtype=torch.uint8)
    images[4] = 16  # white
    images[5, 0, 0, 1] = 8
    pixels = tiles(images, grey_levels=17, columns=3)
    height, width = pixels.shape
    cell = (width - 2) // 3
    assert (width, height) == (3 * cell + 2, 2 * cell + 2)
    assert 600 < width < 680

    def value(index, row, column):
        factor = (cell - 2) // 2
        left, top = 2 + index % 3 * cell, 2 + index // 3 * cell
        return int(pixels[top + factor * row + factor // 2, left + factor * column + factor // 2])

    assert [value(index, 0, 0) for index in range(6)] == [0, 0, 0, 0, 255, 0]
    assert (value(5, 0, 1), value(5, 1, 0)) == (128, 0)
    assert pixels[0, cell // 2] == 255  # the gap


def test_channels_beyond_colour_are_left_out():
    for channels, kept in ((1, 1), (2, 1), (3, 3), (4, 3), (5, 3)):
        images = pictures(2, (channels, 4, 4))
        assert torch.equal(tiles(images), tiles(images[:, :kept]))
        assert tiles(images).dim() == (2 if kept == 1 else 3)
    assert torch.equal(tiles(pictures().numpy()), tiles(pictures()))


def test_a_title_stands_above_the_pixels():
    plain, titled = plot.image_grid(pictures()), plot.image_grid(pictures(), title="digits $")
    one, other = drawn(plain), drawn(titled)
    assert other.shape[0] == one.shape[0] + 40
    assert (other[40:] == one).all()
    assert "digits $" in texts(titled)


def test_an_interpolation_is_a_row_each_with_its_shares_below():
    rows = pictures(15).view(3, 5, 1, 4, 4)
    figure = plot.interpolation(rows)
    pixels = tiles(rows.flatten(0, 1), columns=5)
    found = drawn(figure)
    assert (found[: len(pixels), :, 0] == pixels.numpy()).all()
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == ["0", "0.25", "0.5", "0.75", "1"]
    many = plot.interpolation(pictures(40).view(1, 40, 1, 4, 4))
    assert len(many.axes[0].get_xticks()) <= 12
    drawn(plot.interpolation(pictures(2).view(2, 1, 1, 4, 4)))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (torch.zeros(3, 4, 4, dtype=torch.uint8), r"images are \[3, 4, 4\]: expected \[N, C, H, W\], none of them 0"),
        (torch.zeros(0, 3, 4, 4, dtype=torch.uint8), r"images are \[0, 3, 4, 4\]"),
        (torch.zeros(2, 0, 4, 4, dtype=torch.uint8), r"images are \[2, 0, 4, 4\]"),
        (torch.rand(2, 1, 4, 4), r"images are torch.float32: expected uint8"),
    ],
)
def test_other_shapes_and_types_are_named(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        plot.image_grid(wrong)


def test_levels_and_columns_are_checked():
    with pytest.raises(ValueError, match="images hold 31: expected values below grey_levels, 16"):
        plot.image_grid(torch.full((1, 1, 2, 2), 31, dtype=torch.uint8), grey_levels=16)
    for levels in (1, 257):
        with pytest.raises(ValueError, match=f"grey_levels is {levels}: expected 2 .. 256"):
            plot.image_grid(pictures(), grey_levels=levels)
    with pytest.raises(ValueError, match="columns is 0"):
        plot.image_grid(pictures(), columns=0)
    with pytest.raises(ValueError, match=r"rows are \[6, 1, 4, 4\]: expected \[R, M, C, H, W\]"):
        plot.interpolation(pictures())


def test_arrays_that_run_backwards():
    images = pictures(4, (3, 8, 8))
    assert torch.equal(tiles(images.numpy()[:, ::-1]), tiles(images.flip(1)))
    drawn(plot.interpolation(images.numpy()[None, ::-1]))
