"""Pictures of flows of the plane: density, grid, points, steps, and all on one page."""

import math

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal

pytest.importorskip("matplotlib")

from figures import bent, drawn, flow_of, rows, shifted, texts

from nfkernels import nn as N
from nfkernels import plot
from nfkernels.models import Glow, RealNVP
from nfkernels.plot import grid
from nfkernels.plot.density import on_grid
from nfkernels.plot.steps import flatten, stages


def conditional():
    """A flow that its context moves and stretches."""
    flow = RealNVP(2, layers=2, hidden=8, context=1)
    generator = torch.Generator().manual_seed(0)
    for parameter in flow.parameters():
        parameter.data.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return flow.eval()


# --- density ----------------------------------------------------------------------------------------------------------


def test_the_density_is_drawn_the_right_way_up():
    flow = flow_of(N.Standardize(torch.tensor([2.0, -1.0]), 0.5))
    log_p = on_grid(flow, ((-1.0, 5.0), (-4.0, 2.0)), None, 60)
    assert log_p.shape == (60, 60)
    assert torch.from_numpy(log_p).exp().sum().item() * 0.01 == pytest.approx(1, abs=1e-3)
    row, column = divmod(int(log_p.argmax()), 60)
    assert {row, column} <= {29, 30}
    wide = on_grid(flow_of(N.Standardize(torch.tensor([3.5, 0.0]), 0.5)), ((0.0, 4.0), (-1.0, 1.0)), None, 60)
    assert wide.shape == (30, 60)
    assert int(wide.argmax()) % 60 > 45


def test_the_map_holds_the_flows_log_density_and_the_data():
    flow, data = shifted(), rows(50)
    figure = plot.density(flow, data=data, limits=((-1, 3), (0, 4)), pixels=8)
    axes = figure.axes[0]
    (image,) = axes.images
    assert image.get_extent() == [-1, 3, 0, 4]
    values = torch.from_numpy(image.get_array().data)
    assert values.shape == (8, 8)
    assert values[1, 6].item() == pytest.approx(flow.log_prob(torch.tensor([[2.25, 0.75]])).item(), rel=1e-6)
    low, high = image.get_clim()
    assert (high - low, high) == pytest.approx((8, values.max().item()))
    assert torch.equal(torch.from_numpy(axes.lines[0].get_xydata()).float(), data)
    assert axes.get_xlim() == (-1, 3)
    assert "nats" in texts(figure)
    drawn(figure)


@pytest.mark.parametrize(
    "other",
    [
        MultivariateNormal(torch.tensor([1.0, 2.0]), 0.25 * torch.eye(2)),
        Independent(Normal(torch.tensor([1.0, 2.0]), 0.5), 1),
        Independent(Normal(torch.tensor([1.0, 2.0]), 0.5), 1).log_prob,
    ],
)
def test_anything_with_a_density_is_drawn_as_our_flow(other):
    limits = ((-1, 3), (0, 4))
    one, two = (plot.density(it, limits=limits, pixels=10).axes[0].images[0].get_array() for it in (shifted(), other))
    assert abs(one - two).max() < 1e-5
    if not callable(other):
        view = plot.density(other, pixels=10).axes[0]  # seen without limits, by its samples
        assert view.get_xlim()[0] < 0
        assert 2 < view.get_xlim()[1] < 4
    else:
        with pytest.raises(ValueError, match="give limits or data"):
            plot.density(other)


def test_methods_of_modules_are_asked_in_evaluation_mode_and_left_as_they_were():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
            self.frozen = torch.nn.Dropout().eval()
            self.seen = set()

        def log_prob(self, x):
            self.seen.add((self.training, torch.is_grad_enabled(), x.dtype))
            return -(x - self.loc).square().sum(1)

    model = Model()
    for it in (model, model.log_prob):
        plot.density(it, limits=((-1, 1), (-1, 1)), pixels=4)
    assert model.seen == {(False, False, torch.float64)}
    assert model.training
    assert not model.frozen.training


def test_a_title_is_the_only_heading():
    limits = ((-1, 3), (0, 4))
    for figure in (
        plot.density(shifted(), data=rows(), limits=limits, pixels=4, title="mine $_$"),
        plot.density(shifted(1), title="mine $_$"),
        plot.warped_grid(bent(), limits=limits, title="mine $_$"),
    ):
        drawn(figure)
        headings = [axes.get_title(where) for axes in figure.axes for where in ("left", "center")]
        headings.append(figure.get_suptitle())
        assert [heading for heading in headings if heading] == ["mine $_$"]
    assert "log-density and data" in texts(plot.density(shifted(), data=rows(), pixels=4))
    lower, higher = (
        plot.density(shifted(), limits=limits, pixels=4, title=title).get_figheight() for title in ("t", "t " * 80)
    )
    assert lower < higher


def test_figures_of_tall_and_wide_planes_stay_on_a_page():
    for limits in (((0, 1), (0, 2.9)), ((0, 2.9), (0, 1)), ((0, 1), (0, 1)), ((0, 1), (0, 1000))):
        for figure in (plot.density(shifted(), limits=limits, pixels=4), plot.warped_grid(bent(), limits=limits)):
            width, height = figure.get_size_inches()
            assert 2.4 < width < 6.3
            assert 2.4 < height < 6.9


def test_one_column_is_a_curve_over_a_histogram():
    flow, data = shifted(1), rows(500, 1)
    figure = plot.density(flow, data=data)
    (axes,) = figure.axes
    line = torch.from_numpy(axes.lines[0].get_xydata())
    assert torch.allclose(line[:, 1].float(), flow.log_prob(line[:, :1].float()).exp(), atol=1e-6)
    area = sum(patch.get_path().vertices[:, 1].max() > 0 for patch in axes.patches)
    assert area == 1
    low, high = axes.get_xlim()
    assert (low, high) == pytest.approx((-0.7, 2.7), abs=0.5)
    assert plot.density(flow, limits=(0, 2)).axes[0].get_xlim() == (0, 2)
    assert plot.density(Normal(0.0, 1.0), limits=(-1, 1)).axes[0].lines[0].get_ydata().max() == pytest.approx(
        0.399, abs=1e-3
    )


def test_a_flow_of_positive_numbers_is_drawn_where_it_has_a_density():
    flow = flow_of(N.Exp().inv)
    for draw in (plot.density(flow, pixels=10), plot.overview(flow, flow.decode(rows()), pixels=10)):
        assert draw.axes[0].get_xlim()[0] > 0
        assert draw.axes[0].get_ylim()[0] > 0
    with pytest.raises(ValueError, match="needs positive data"):
        plot.density(flow, limits=((-1, 1), (0, 1)))


def test_a_density_that_is_no_number_is_told():
    def broken(x):
        return torch.where(x[:, 0] > 0, -x.square().sum(1), math.nan)

    told = texts(plot.density(broken, limits=((-1, 1), (-1, 1)), pixels=10))
    assert "NaN or infinite at 50 of 100 points" in told
    inside = plot.density(
        lambda x: torch.where(x.norm(dim=1) < 1, 0.0, -math.inf), limits=((-2, 2), (-2, 2)), pixels=10
    )
    assert "NaN" not in texts(inside)
    drawn(inside)
    with pytest.raises(ValueError, match="nowhere finite within these limits"):
        plot.density(lambda x: x[:, 0] * math.nan, limits=((-1, 1), (-1, 1)), pixels=4)


def test_rows_that_are_not_finite_are_left_out_and_told():
    data = rows(100)
    data[3, 0], data[7, 1] = math.nan, math.inf
    with pytest.warns(UserWarning, match="2 of 100 rows of data are not finite and left out") as warned:
        figure = plot.density(shifted(), data=data, pixels=10)
    assert warned[0].filename == __file__
    assert "2 of 100 rows of data are not finite and left out" in texts(figure)
    assert len(figure.axes[0].lines[0].get_xdata()) == 98
    with pytest.raises(ValueError, match="data holds NaN or infinite values in all 100 rows"):
        plot.density(shifted(), data=data * math.nan)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"data": torch.zeros(4, 3)}, "data has 3 columns and the flow 2"),
        ({"data": torch.zeros(4, 1, 8, 8)}, r"data is \[4, 1, 8, 8\]: expected rows \[N, D\]"),
        ({"data": torch.zeros(0, 2)}, r"data is \[0, 2\]: expected rows \[N, D\], at least one row"),
        ({"limits": (0, 1)}, "expected"),
        ({"limits": ((1, 0), (0, 1))}, r"\(1\.0, 0\.0\): expected \(low, high\), both finite, low < high"),
        ({"limits": ((0, math.inf), (0, 1))}, "both finite"),
        ({"pixels": 1}, "pixels is 1: expected at least 2"),
    ],
)
def test_what_is_refused_is_named(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        plot.density(shifted(), **arguments)


def test_a_flow_of_images_or_of_many_columns_is_sent_elsewhere():
    with pytest.raises(ValueError, match=r"one or two columns, got 3: nfkernels\.plot\.corner"):
        plot.density(shifted(3))
    for images in (N.Flow(N.Chain(), N.StandardNormal((1, 4, 4))), Glow((1, 4, 4), levels=1, steps=1, hidden=8)):
        for draw in (plot.density, plot.warped_grid, plot.steps):
            with pytest.raises(ValueError, match=r"the flow is over \(1, 4, 4\): .* image_grid draws images"):
                draw(images)
    with pytest.raises(ValueError, match=r"gave \[16, 2\]: expected one number each, \[16\]"):
        plot.density(lambda x: x, limits=((0, 1), (0, 1)), pixels=4)
    with pytest.raises(TypeError, match="expected a flow, or a function of points"):
        plot.density(3, limits=((0, 1), (0, 1)))


def test_columns_far_from_zero_are_drawn_in_the_flows_own_precision():
    """Seconds since 1970: the next number of float32 is two minutes away."""
    for count in (1, 2):
        flow = flow_of(N.Standardize(torch.full((count,), 1.7e9, dtype=torch.float64), 1.0), columns=count).double()
        axes = plot.density(flow, limits=[(1.7e9 - 3, 1.7e9 + 3)] * 2 if count == 2 else (1.7e9 - 3, 1.7e9 + 3)).axes[0]
        drawn = axes.images[0].get_array().data[110] if count == 2 else axes.lines[0].get_ydata()
        assert len(set(drawn.round(6).tolist())) > 100
    assert grid.warped(flow)[0, :, 0, 0].unique().numel() == 21


# --- the grid ---------------------------------------------------------------------------------------------------------


def test_the_grid_is_straight_in_the_latent():
    flow = flow_of(N.Standardize(torch.tensor([1.0, 2.0]), 2.0))
    lines = grid.warped(flow)
    assert lines.shape == (2, 21, 600, 2)
    assert (lines[0, :, :, 0].std(1) < 1e-5).all()  # one z_1 along each line of the first family
    assert (lines[1, :, :, 1].std(1) < 1e-5).all()
    assert torch.allclose(flow.encode(lines[0, 0, :1]), torch.tensor([[-2.5, -2.5]]), atol=1e-5)
    assert torch.allclose(flow.encode(lines[1, -1, -1:]), torch.tensor([[2.5, 2.5]]), atol=1e-5)
    figure = plot.warped_grid(flow, limits=((-4, 6), (-3, 7)))
    axes = figure.axes[0]
    assert [len(family.get_segments()) for family in axes.collections] == [21, 21]
    assert axes.get_xlim() == (-4, 6)
    assert "constant $z_1$" in texts(figure)


def test_the_grid_of_another_base_stays_within_it():
    flow = N.Flow(N.Chain(N.Standardize(1.0, 2.0)), N.Uniform(2, -1.0, 1.0)).eval()
    lines = grid.warped(flow)
    assert lines.min() == pytest.approx(-1, abs=0.1)
    assert lines.max() == pytest.approx(3, abs=0.1)


def test_an_inverse_that_fails_somewhere_is_told():
    class Broken(N.Bijection):
        uses_context = False

        def forward(self, x, context=None, *, lengths=None):
            return x, x.new_zeros(len(x))

        def inverse(self, z, context=None, *, lengths=None):
            return torch.where(z > 2.0, math.nan, z), z.new_zeros(len(z))

    flow = flow_of(Broken())
    with pytest.warns(UserWarning, match="rows of samples of the flow are not finite"):
        told = texts(plot.warped_grid(flow))
    assert "the inverse is not finite at" in told
    assert "of 25,200 points of the grid" in told


def test_the_picture_is_of_one_context():
    flow = conditional()
    for draw in (plot.density, plot.warped_grid, plot.steps):
        options = {"pixels": 10} if draw is plot.density else {}
        one, other = (drawn(draw(flow, context=torch.tensor([[c]]), **options)) for c in (-3.0, 3.0))
        assert one.shape != other.shape or (one != other).any()
        with pytest.raises(ValueError, match=r"context is \[2, 1\]: expected one for the whole picture"):
            draw(flow, context=torch.zeros(2, 1), **options)


@pytest.mark.parametrize("draw", [plot.warped_grid, plot.steps])
def test_layers_are_needed(draw):
    with pytest.raises(TypeError, match="the layers of a Flow of nfkernels do, got a Normal"):
        draw(Normal(0.0, 1.0))
    with pytest.raises(ValueError, match="columns"):
        draw(shifted(1))


# --- points -----------------------------------------------------------------------------------------------------------


def test_dots_are_the_rows_under_equal_limits():
    data, samples = rows(60), 3 * rows(40, seed=1)
    figure = plot.samples(data, samples, names=["a", "b $"])
    left, right = figure.axes
    assert torch.equal(torch.from_numpy(left.lines[0].get_xydata()).float(), data)
    assert torch.equal(torch.from_numpy(right.lines[0].get_xydata()).float(), samples)
    assert left.get_xlim() == right.get_xlim()
    assert left.get_xlim()[1] > 3
    assert "data (60)" in texts(figure)
    assert "b $" in texts(figure)
    drawn(figure)


@pytest.mark.parametrize("columns", [1, 3, 30])
def test_other_numbers_of_columns_are_histograms(columns):
    figure = plot.samples(rows(300, columns), rows(200, columns, seed=1))
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == min(columns, 24)
    assert ("6 more columns are not drawn" in texts(figure)) == (columns == 30)
    for axes in shown:
        areas = [abs(_area(patch)) for patch in axes.patches]
        assert areas == pytest.approx([1, 1], abs=0.05)  # of both, 99 % inside
    drawn(figure)


def _area(patch):
    x, y = patch.get_path().vertices.T
    return 0.5 * float((x * torch.from_numpy(y).roll(-1).numpy() - torch.from_numpy(x).roll(-1).numpy() * y).sum())


def test_rows_of_other_columns_are_refused():
    with pytest.raises(ValueError, match="data has 2 columns and samples 3"):
        plot.samples(rows(), rows(columns=3))
    with pytest.raises(ValueError, match="names has 1 entries: expected 2"):
        plot.samples(rows(), rows(), names=["a"])
    with pytest.raises(ValueError, match="limits are for two columns, got rows of 3"):
        plot.samples(rows(columns=3), rows(columns=3), limits=((0, 1), (0, 1)))


def test_single_rows_are_drawn():
    one = rows(1)
    for figure in (
        plot.samples(one, one),
        plot.samples(one[:, 0], one[:, 0]),
        plot.density(shifted(), data=one, pixels=8),
    ):
        low, high = figure.axes[0].get_xlim()
        assert low < one[0, 0].item() < high
        drawn(figure)


# --- steps ------------------------------------------------------------------------------------------------------------


def test_stages_are_what_each_layer_makes_of_the_points():
    squeezed = N.Chain(N.Affine(0.0, torch.tensor([2.0, 1.0])))
    standardize = N.Standardize(torch.tensor([5.0, 7.0]), 3.0)
    flow = flow_of(standardize, squeezed, N.Permutation(2, "reverse"), N.Tanh().inv)
    z = torch.randn(40, 2)
    seen = stages(flow, z)
    assert len(seen) == 3
    shift = torch.tensor([5.0, 7.0])
    assert torch.allclose(seen[0], z.flip(1) * 3 + shift, atol=1e-5)
    assert torch.allclose(seen[1], z.tanh().flip(1) * 3 + shift, atol=1e-5)
    assert torch.allclose(seen[2], flow.decode(z), atol=1e-5)
    assert flatten(flow.bijection)[0] is standardize


def test_what_bends_nothing_has_no_stage_of_its_own():
    mix = [N.LULinear(2) for _ in range(3)]
    for layer in mix:
        torch.nn.init.normal_(layer.lower)
    flow = flow_of(mix[0], N.Tanh().inv, mix[1], N.Tanh().inv, mix[2])
    z = 0.1 * torch.randn(10, 2)
    with torch.no_grad():
        seen = stages(flow, z)
        assert len(seen) == 3
        assert torch.equal(seen[0], z)
        assert torch.allclose(seen[1], mix[1].inverse(mix[2].inverse(z)[0].tanh())[0])
        assert torch.equal(seen[2], flow.decode(z))


def test_steps_have_a_panel_each_in_one_frame():
    flow = bent()
    figure = plot.steps(flow, count=30, seed=3)
    first, second, third = figure.axes
    z = flow.base.sample(30, generator=torch.Generator().manual_seed(3))
    last = torch.from_numpy(third.collections[0].get_offsets().data)
    assert torch.allclose(last.float(), flow.decode(z), atol=1e-5)
    assert [axes.get_title() for axes in (first, second, third)] == ["base", "layer 2", "layer 1: data"]
    assert first.get_xlim() == third.get_xlim()
    angle = torch.from_numpy(first.collections[0].get_array().data)
    assert torch.allclose(angle.float(), torch.atan2(z[:, 1], z[:, 0]))
    deep = flow_of(*[N.Tanh().inv for _ in range(11)])
    panels = [axes for axes in plot.steps(deep, count=5).axes if axes.get_visible()]
    assert len(panels) == 12
    drawn(plot.steps(flow_of(N.Standardize(1.0, 2.0)), count=1))  # nothing bends: the base is the data


def test_one_point_far_away_does_not_set_the_frame():
    class Throws(N.Bijection):
        uses_context = False

        def inverse(self, z, context=None, *, lengths=None):
            far = torch.arange(len(z)) == 7
            return torch.where(far[:, None], 1e6, z), z.new_zeros(len(z))

    figure = plot.steps(flow_of(Throws()), count=60)
    low, high = figure.axes[0].get_xlim()
    assert -8 < low < -2 < 2 < high < 8
    assert "1 of 60 points lie outside" in texts(figure)
    assert "outside" not in texts(plot.steps(bent(), count=60))
    assert "outside" not in texts(plot.steps(flow_of(Throws()), count=60, limits=((-2, 2), (-2, 2))))


def test_steps_of_more_columns_show_two_of_them():
    flow = flow_of(N.Standardize(torch.arange(4.0), 1.0), N.Tanh().inv, columns=4)
    figure = plot.steps(flow, count=20, columns=(3, 1))
    z = flow.base.sample(20, generator=torch.Generator().manual_seed(0))
    last = torch.from_numpy(figure.axes[-1].collections[0].get_offsets().data)
    assert torch.allclose(last.float(), flow.decode(z)[:, [3, 1]], atol=1e-5)
    for wrong in ((0, 0), (0, 4), (1,)):
        with pytest.raises(ValueError, match=r"expected two different ones of 0 \.\. 3"):
            plot.steps(flow, columns=wrong)
    with pytest.raises(ValueError, match="count is 0"):
        plot.steps(flow, count=0)


# --- one page ---------------------------------------------------------------------------------------------------------


def test_an_overview_is_the_four_pictures():
    flow, data = bent(), rows(80)
    figure = plot.overview(flow, data, limits=((-1, 3), (0, 4)), pixels=10, title="a $ title")
    density, lines, left, right, _ = figure.axes
    assert len(density.images) == 1
    assert [len(family.get_segments()) for family in lines.collections] == [21, 21]
    assert torch.equal(torch.from_numpy(left.lines[0].get_xydata()).float(), data)
    assert len(right.lines[0].get_xdata()) == 80
    assert {axes.get_xlim() for axes in (density, lines, left, right)} == {(-1, 3)}
    assert "a $ title" in texts(figure)
    own = plot.overview(flow, data, samples=data[:7], pixels=10)
    assert len(own.axes[3].lines[0].get_xdata()) == 7
    with pytest.raises(ValueError, match="samples has 3 columns and the flow 2"):
        plot.overview(flow, data, samples=rows(columns=3))
