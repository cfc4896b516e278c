"""How every picture is made: without pyplot, the same under any settings, readable in grey, written whole."""

import io
import pickle
import subprocess
import sys

import numpy
import pytest
import torch

matplotlib = pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

from figures import bent, drawn, every_picture, grey, pictures, rows, shifted  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from nfkernels import plot  # noqa: E402
from nfkernels.nn import Exp  # noqa: E402
from nfkernels.plot import style  # noqa: E402

PICTURES = every_picture()


@pytest.mark.parametrize("name", PICTURES)
def test_every_function_returns_a_figure_and_leaves_no_trace(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings, state = list(dict.items(matplotlib.rcParams)), torch.random.get_rng_state()
    figure = PICTURES[name]()
    assert isinstance(figure, Figure)
    pixels = drawn(figure)
    assert (pixels != 255).any()
    assert list(dict.items(matplotlib.rcParams)) == settings
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not list(tmp_path.iterdir())
    # Twice the same, also where the user likes white on black.
    mine = {"figure.facecolor": "black", "text.color": "white", "font.size": 20, "figure.dpi": 40}
    with matplotlib.rc_context(mine):
        other = PICTURES[name]()
    assert (drawn(other) == pixels).all()


def test_the_list_of_pictures_is_whole():
    assert set(PICTURES) == set(plot.__all__) - {"save"}


def test_matplotlib_is_imported_to_draw_and_pyplot_never():
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from figures import drawn, every_picture\n"
        "print('matplotlib' in sys.modules)\n"
        "for make in every_picture().values(): drawn(make())\n"
        "print('matplotlib' in sys.modules, 'matplotlib.pyplot' in sys.modules, 'tkinter' in sys.modules)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, *sys.path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False", "True", "False", "False"], done.stderr


@pytest.mark.parametrize("name", PICTURES)
def test_a_missing_matplotlib_is_one_sentence(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    told = r'^drawing needs matplotlib, which is missing: pip install "nfkernels\[plot\]"$'
    with pytest.raises(ImportError, match=told):
        PICTURES[name]()


# --- grey -------------------------------------------------------------------------------------------------------------


def test_maps_and_series_keep_their_order_in_grey():
    steps = grey(matplotlib.colormaps[style.DENSITY](numpy.linspace(0, 1, 64)))
    assert (numpy.diff(steps) > 0.2).all()
    colours = grey([colour for colour, _, _ in style.SERIES])
    assert (numpy.diff(colours) > 7).all()
    fills = grey(style.FILLS)
    assert (numpy.diff(fills) < -7).all()
    assert fills[-1] - grey([style.RED])[0] > 25  # samples over the densest area of the data
    assert grey([style.PALE_BLUE])[0] - grey([style.SKY])[0] > 10
    assert grey([style.ORANGE])[0] - grey([style.BLUE])[0] > 25  # the two families of a grid


def test_angles_go_up_and_down_in_lightness_once():
    steps = grey(style.circle()(numpy.linspace(0, 1, 65)))
    turn = int(steps.argmax())
    assert 20 < turn < 45
    assert (numpy.diff(steps[: turn + 1]) > 0).all()
    assert (numpy.diff(steps[turn:]) < 0).all()
    assert steps[-1] == pytest.approx(steps[0])


def test_series_differ_in_lines_or_markers_too():
    assert len({(dashes, marker) for _, dashes, marker in style.SERIES}) == len(style.SERIES)
    assert len({marker for _, _, marker in style.SERIES}) == len(style.SERIES)


# --- words ------------------------------------------------------------------------------------------------------------

LONG = [f"a long name, as tables have them, number {at} of many" for at in range(4)]


@pytest.mark.parametrize(
    "draw",
    [
        lambda title: plot.corner(rows(columns=4), names=LONG, title=title),
        lambda title: plot.calibration(torch.arange(400).view(100, 4) % 11, 10, names=LONG, title=title),
        lambda title: plot.coverage([0.5], [[0.4, 0.5, 0.6, 0.7]], count=10, names=LONG, title=title),
        lambda title: plot.samples(rows(), rows(), names=LONG[:2], title=title),
        lambda title: plot.samples(rows(columns=4), rows(columns=4), names=LONG, title=title),
        lambda title: plot.training_curve([{"step": 1, "bpd": 2.0}], baselines={LONG[0]: 3.0}, title=title),
        lambda title: plot.image_grid(pictures(), title=title),
        lambda title: plot.density(shifted(), pixels=4, title=title),
        lambda title: plot.density(shifted(1), title=title),
        lambda title: plot.warped_grid(bent(), title=title),
        lambda title: plot.change_of_variables(Exp(), title=title),
    ],
)
def test_long_names_stay_in_the_picture_and_off_each_other(draw):
    from matplotlib.text import Text

    figure = draw("a title of as many words as somebody may have for a picture " * 3)
    drawn(figure)
    page = figure.bbox
    boxes = [t.get_window_extent() for t in figure.findobj(Text) if len(t.get_text()) > 7 and t.get_visible()]
    assert len(boxes) >= 1
    for box in boxes:
        assert page.x0 - 1 <= box.x0 <= box.x1 <= page.x1 + 1
        assert page.y0 - 1 <= box.y0 <= box.y1 <= page.y1 + 1
    assert not any(one.overlaps(other) for at, one in enumerate(boxes) for other in boxes[:at])


def test_short_keeps_beginning_and_end():
    assert style.short("a" * 30 + "b" * 30, 1.0, 10) == "aaaaa...bbb"
    assert style.short("abc", 1.0, 10) == "abc"
    assert style.wrapped("one two three", 1.0, 10) == "one two\nthree"


# --- files and notebooks ----------------------------------------------------------------------------------------------


def test_save_is_atomic_and_knows_its_suffix(tmp_path, monkeypatch):
    figure = plot.training_curve([{"step": 1, "bpd": 2.0}, {"step": 2, "bpd": 1.0}])
    path = tmp_path / "a.PNG"
    plot.save(figure, path, software="a test")
    first = path.read_bytes()
    picture = Image.open(path)
    assert picture.size == tuple(int(side * style.DPI) for side in figure.get_size_inches())
    assert picture.info["Software"] == "a test"

    def broken(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(figure), "savefig", broken)
    with pytest.raises(OSError, match="No space left"):
        plot.save(figure, path)
    assert path.read_bytes() == first
    assert [file.name for file in tmp_path.iterdir()] == ["a.PNG"]
    with pytest.raises(ValueError, match=r"x\.jpg: expected a name that ends in \.png"):
        plot.save(figure, tmp_path / "x.jpg")


def test_one_picture_is_one_file(tmp_path):
    for name in ("a", "b"):
        plot.save(plot.calibration([3, 1, 2, 0] * 10, 4), tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_notebook_shows_a_figure_and_it_can_be_kept():
    figure = plot.coverage([0.5], [0.4], count=10)
    picture = Image.open(io.BytesIO(figure._repr_png_()))
    assert picture.size == tuple(int(side * style.DPI) for side in figure.get_size_inches())
    again = pickle.loads(pickle.dumps(figure))
    assert (drawn(again) == drawn(figure)).all()
