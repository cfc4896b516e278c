"""The ops' tables: the bytes that each case must move, sizes, and that all rivals compute the same."""

import itertools

import pytest
import torch

from benchmarks.case import BACKWARD, EXTRA, FORWARD, HEADLINE, INVERSE, STEP, Case, draw, exact, prepare
from benchmarks.gate import compare
from benchmarks.ops import TABLES, tables
from benchmarks.peers.layers import COUPLINGS, SPLINES

OPS = {module.OP.name: module.OP for module in TABLES}
SHAPE = (2, 8, 4, 4)
N = 2 * 8 * 4 * 4  # elements; 4 bytes each


@pytest.mark.parametrize(
    ("op", "direction", "variant", "passes"),
    [
        ("affine_coupling", FORWARD, "", 3),
        ("affine_coupling", BACKWARD, "", 4),
        ("affine_coupling", STEP, "", 7),
        ("affine_coupling", BACKWARD, "realnvp", 4.5),
        ("affine_coupling", FORWARD, "halves", 4),  # of the half: 2 of the whole
        ("affine_coupling", BACKWARD, "halves", 6),
        ("autoregressive_conv", FORWARD, "", 2),
        ("autoregressive_conv", INVERSE, "solve", 2),
        ("autoregressive_conv", STEP, "raster", 5),
        ("channel_mix", FORWARD, "", 2),
        ("channel_mix", BACKWARD, "", 3),
        ("coupling_mix", FORWARD, "", 3),
        ("coupling_mix", BACKWARD, "", 5),
        ("autoregressive_inverse", INVERSE, "", 2),
        ("lu_linear", FORWARD, "", 2),
        ("lu_linear", INVERSE, "", 2),
        ("lu_linear", STEP, "", 5),
        ("lu_layer", STEP, "", 5),
        ("channel_affine", FORWARD, "", 2),
        ("channel_affine", STEP, "permuted", 5),
        ("gaussian_log_density", FORWARD, "", 3),
        ("gaussian_log_density", FORWARD, "standard normal", 1),
        ("gaussian_log_density", BACKWARD, "", 6),
        ("gaussian_log_density", BACKWARD, "standard normal", 2),
        ("dequantize", FORWARD, "", 1.25),
        ("rational_quadratic_spline", FORWARD, "", 25),  # 3 K + 1
        ("rational_quadratic_spline", INVERSE, "16 bins", 49),
        ("rational_quadratic_spline", BACKWARD, "", 49),  # 6 K + 1
    ],
)
def test_bytes_are_those_of_the_design(op, direction, variant, passes):
    assert OPS[op].count(Case(op, direction, SHAPE, variant), direction)[0] == passes * N * 4


def test_narrow_params_move_fewer_bytes():
    case = Case("coupling_mix", FORWARD, SHAPE, params=torch.bfloat16)
    assert OPS["coupling_mix"].count(case, FORWARD)[0] == 2.5 * N * 4


def test_bytes_and_flops_of_the_lu_composition():
    """Matrices of 8 x 8, two of them: three such stacks move and C^3 products are made for both, forward."""
    op, shape = OPS["lu_compose"], (2, 8, 8)
    assert op.count(Case("lu_compose", FORWARD, shape), FORWARD) == (3 * 128 * 4, 2 * 1024)
    assert op.count(Case("lu_compose", STEP, shape), STEP) == (9 * 128 * 4, 8 * 1024)
    assert op.count(Case("lu_compose", BACKWARD, shape, "nflows", dtype=torch.float64), BACKWARD)[0] == 4 * 128 * 8


def test_flops_of_the_mixes():
    for direction, products in ((FORWARD, 2), (BACKWARD, 4)):
        assert OPS["channel_mix"].count(Case("channel_mix", direction, SHAPE), direction)[1] == products * 8 * N


@pytest.mark.parametrize("kind", ["cuda", "cpu", "quick"])
@pytest.mark.parametrize("name", OPS)
def test_cases_are_distinct_and_have_a_headline(name, kind):
    cases = OPS[name].cases(kind)
    assert len({c.id for c in cases}) == len(cases)
    assert any(c.importance == HEADLINE for c in cases)
    assert all(c.op == name and HEADLINE <= c.importance <= EXTRA for c in cases)


# A network's matrices, small layers: bound by latency. Splines: a gigabyte of data would have 23 of params. Networks:
# bound by their products.
SMALL = {"lu_compose", "lu_layer", "rational_quadratic_spline", "autoregressive_inverse", "dense_net"}


@pytest.mark.parametrize("name", [n for n in OPS if n not in SMALL])
def test_gpu_sizes_go_from_launch_bound_to_a_gigabyte(name):
    sizes = sorted(c.elements * 4 for c in OPS[name].cases("cuda"))
    assert sizes[0] < 100e3
    assert 0.95e9 < sizes[-1] < 1.2e9
    assert all(c.elements * 4 >= 64e6 for c in OPS[name].cases("cuda") if c.importance == HEADLINE)


@pytest.mark.parametrize("name", OPS)
def test_rivals_compute_what_plain_pytorch_does(name):
    op = OPS[name]
    for variant in dict.fromkeys(c.variant for c in op.cases("quick")):
        for params in (torch.float32, torch.bfloat16):
            case = Case(name, FORWARD, (3, 6, 4, 4), variant, params=params)
            sample = draw(op, case, "cpu")
            plain = op.plain(variant)(sample.inputs, False)
            target = op.plain(variant)(exact(op, sample).inputs, False)
            for peer in op.peers(variant).values():
                got = peer.run(peer.adapt(sample.inputs), False)
                if peer.check:
                    assert peer.check(sample.inputs, got)
                    assert not peer.check(sample.inputs, (got[0] + 0.5, *got[1:]))
                else:
                    assert compare(got, plain, target, ours=False).ok


def test_ops_by_name():
    assert [op.name for op in tables()] == list(OPS)
    assert [op.name for op in tables(["dequantize"])] == ["dequantize"]
    with pytest.raises(ValueError, match="unknown op 'splines'"):
        tables(["splines"])


@pytest.mark.parametrize("library", COUPLINGS)
def test_other_libraries_compute_the_same(library):
    pytest.importorskip(library)
    op = OPS["affine_coupling"]
    for direction in (FORWARD, INVERSE, STEP):
        case = Case(op.name, direction, (3, 6, 4, 4), library)
        sample = draw(op, case, "cpu")
        with torch.set_grad_enabled(direction == STEP):
            got, plain, target = (
                prepare(op, case, run, s)()
                for run, s in (
                    (op.peers(library)[library].run, sample),
                    (op.plain(library), sample),
                    (op.plain(library), exact(op, sample)),
                )
            )
        verdict = compare(got, plain, target, ours=False)
        assert verdict.ok, verdict.reason


@pytest.mark.parametrize("library", SPLINES)
def test_other_splines_compute_the_same(library):
    pytest.importorskip(library)
    op, variant = OPS["rational_quadratic_spline"], "zuko" if library == "zuko" else ""
    for direction, shape in itertools.product((FORWARD, INVERSE, STEP), ((40, 6), (3, 2, 4, 4))):
        case = Case(op.name, direction, shape, variant, dtype=torch.float64, params=torch.float64)
        sample = draw(op, case, "cpu")
        with torch.set_grad_enabled(direction == STEP):
            got = prepare(op, case, op.peers(variant)[library].run, sample)()
            target = prepare(op, case, op.plain(variant), sample)()
        for a, b in zip(got, target, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_the_other_lu_linear_computes_the_same():
    pytest.importorskip("nflows")
    op = OPS["lu_linear"]
    peer = op.peers("nflows")["nflows"]
    for direction in (FORWARD, INVERSE, STEP):
        sample = draw(op, Case(op.name, direction, (40, 6), "nflows"), "cpu")
        theirs = type(sample)(peer.adapt(sample.inputs), sample.cotangents)
        with torch.set_grad_enabled(direction == STEP):
            got = prepare(op, Case(op.name, direction, (40, 6), "nflows"), peer.run, theirs)()
        assert peer.check(sample.inputs, got)
        assert not peer.check(sample.inputs, (got[0] + 0.5,))
