"""The LU layer: the one call against its pieces and the dense matrix; packed triangles, permutations, gradients."""

import itertools

import numpy as np
import pytest
import torch
from cases import tensor

from nfkernels import lu_layer, lu_linear, use_backend
from nfkernels.ops import _library
from nfkernels.reference.lu_layer import dense, packed

EPS = {torch.float64: 2.3e-16, torch.float32: 1.2e-7, torch.bfloat16: 7.9e-3, torch.float16: 9.8e-4}


def factors(width, dtype=torch.float32, *, diagonal="softplus", as_packed=True, ordered=True, bias=True):
    count, scale = width * (width - 1) // 2, 0.5 / width**0.5
    shape = (count,) if as_packed else (width, width)
    values = {"lower": scale * torch.randn(shape, dtype=dtype), "upper": scale * torch.randn(shape, dtype=dtype)}
    values["log_s"] = 0.3 * torch.randn(width, dtype=dtype)
    values["bias"] = torch.randn(width, dtype=dtype) if bias else None
    options = {"diagonal": diagonal}
    if ordered:
        options["columns"] = torch.randperm(width)
        options["permutation"] = torch.randperm(width)
        if diagonal == "exp":
            options["sign"] = torch.randint(0, 2, (width,)).to(dtype) * 2 - 1
    return values, options


def run(x, values, options, dy, dl, upcast=False):
    wide = (lambda t: t.double()) if upcast else (lambda t: t)
    leaves = {k: wide(v).detach().requires_grad_() for k, v in {"x": x, **values}.items() if v is not None}
    y, logdet = lu_layer(**leaves, **{k: wide(v) if k == "sign" else v for k, v in options.items()})
    grads = torch.autograd.grad((y, logdet), list(leaves.values()), (dy.to(y.dtype), dl.to(logdet.dtype)))
    return [y.detach(), logdet.detach(), *grads]


def against_reference(x, values, options):
    dy, dl = torch.randn_like(x), torch.randn(x.shape[0])
    got = run(x, values, options, dy, dl)
    with use_backend("reference"):
        plain, exact = run(x, values, options, dy, dl), run(x, values, options, dy, dl, upcast=True)
    for a, b, c in zip(got, plain, exact, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape == c.shape
        if a.numel():
            terms = max(x.shape[1], x.numel() // x.shape[1]) ** 0.5 if a.dtype.itemsize >= 4 else 1
            terms *= max(1, x.shape[2:].numel())  # the log-determinant's factor
            slack = 4 * EPS[a.dtype] * c.abs().max().clamp(min=1) * terms
            assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + slack


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("inverse", [False, True])
def test_it_is_its_matrix(backend, inverse):
    """Against numpy's triangles, the dense matrix and slogdet."""
    width = 7
    values, options = factors(width, torch.float64)
    low, up = np.eye(width), np.zeros((width, width))
    low[np.tril_indices(width, -1)] = values["lower"]
    up[np.triu_indices(width, 1)] = values["upper"]
    up[np.diag_indices(width)] = torch.nn.functional.softplus(values["log_s"]) + 1e-3
    order = torch.eye(width, dtype=torch.float64)
    matrix = (torch.from_numpy(low @ up) @ order[options["columns"]])[options["permutation"]]
    x = torch.randn(5, width, 3).double()
    y = torch.einsum("oc,bcp->bop", matrix, x) + values["bias"][:, None]
    logdet = 3 * torch.linalg.slogdet(matrix)[1].expand(5)
    with use_backend(backend):
        if inverse:
            got, total = lu_layer(y, **values, **options, inverse=True)
            torch.testing.assert_close((got, total), (x, -logdet))
        else:
            torch.testing.assert_close(lu_layer(x, **values, **options), (y, logdet))


@pytest.mark.covering
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("width", [1, 2, 5, 10, 16, 31, 64, 96, 128])
def test_native_matches_the_reference(width, inverse):
    kinds = itertools.cycle(itertools.product(("softplus", "exp"), (True, False), (True, False)))
    shapes = [(4 * width + 9, (), "contiguous"), (600, (), "sliced"), (3, (5, 4), "channels_last"),
              (0, (), "contiguous"), (2, (2, 3), "sliced"), (1, (), "contiguous")]  # fmt: skip
    for i, ((batch, spatial, fmt), (diagonal, as_packed, ordered)) in enumerate(zip(shapes, kinds)):
        dtype = [torch.float32, torch.float64, torch.bfloat16][(i + width) % 3]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        values, options = factors(width, wide, diagonal=diagonal, as_packed=as_packed, ordered=ordered, bias=i % 3 > 0)
        against_reference(tensor(batch, width, spatial, dtype, fmt), values, {**options, "inverse": inverse})


@pytest.mark.parametrize("inverse", [False, True])
def test_it_is_lu_linear_and_its_log_determinant(inverse):
    values, options = factors(9, as_packed=False, diagonal="exp")
    del options["columns"]
    x = torch.randn(20, 9)
    y, logdet = lu_layer(x, **values, **options, inverse=inverse)
    assert torch.equal(y, lu_linear(x, **values, **options, inverse=inverse))
    torch.testing.assert_close(logdet, (values["log_s"].sum() * (-1 if inverse else 1)).expand(20))


def test_wide_ones_are_composed():
    values, options = factors(140)
    against_reference(torch.randn(30, 140), values, options)


def test_one_dispatcher_call_each_way():
    """What it is for; the kernel must be there."""
    assert _library.serving("_lu_layer_forward", "cpu")[0] == "native"
    values, options = factors(10)
    x = torch.randn(8, 10, requires_grad=True)
    leaves = {k: v.requires_grad_() for k, v in values.items()}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        lu_layer(x, **leaves, **options)
    top = [e.name for e in seen.events() if e.cpu_parent is None or e.cpu_parent.name == "_LULayer"]
    assert [n for n in top if n != "_LULayer"] == ["nfkernels::_lu_layer_forward"]


@pytest.mark.parametrize("inverse", [False, True])
def test_second_derivatives_and_transforms(inverse):
    values, options = factors(4, torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    leaves = [v.requires_grad_() for v in values.values()]

    def f(x, *v):
        return lu_layer(x, *v, **options, inverse=inverse)

    assert torch.autograd.gradcheck(f, (x, *leaves))
    assert torch.autograd.gradgradcheck(f, (x, *leaves))
    jacobian = torch.func.vmap(torch.func.jacrev(lambda t: f(t[None], *leaves)[0][0]))(x.detach())
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], f(x, *leaves)[1])


def test_only_one_output_has_a_gradient():
    values, options = factors(6, torch.float64)
    leaves = [v.requires_grad_() for v in values.values()]
    x = torch.randn(5, 6, dtype=torch.float64)
    for which in (0, 1):
        got = torch.autograd.grad(lu_layer(x, *leaves, **options)[which].sum(), leaves)
        with use_backend("reference"):
            want = torch.autograd.grad(lu_layer(x, *leaves, **options)[which].sum(), leaves)
        torch.testing.assert_close(got, want)


def test_compiled():
    values, options = factors(5)
    x = torch.randn(6, 5)
    made = torch.compile(lambda x: lu_layer(x, **values, **options), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(made(x), lu_layer(x, **values, **options))


def test_packed_and_back():
    for upper in (False, True):
        entries = torch.arange(1.0, 16.0)
        matrix = dense(entries, 6, upper)
        rows = np.triu_indices(6, 1) if upper else np.tril_indices(6, -1)
        assert np.array_equal(matrix.numpy()[rows], entries.numpy())
        assert matrix.count_nonzero() == 15
        assert torch.equal(packed(matrix, upper), entries)


def test_errors_name_what_was_given():
    values, options = factors(4)
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"lower must be \[4, 4\] or packed \[6\].*got shape \(5,\)"):
        lu_layer(x, **{**values, "lower": torch.zeros(5)}, **options)
    with pytest.raises(ValueError, match=r"columns must be int64, got torch.float32"):
        lu_layer(x, **values, columns=torch.zeros(4))
    with pytest.raises(ValueError, match=r"log_s must be \[4\]"):
        lu_layer(x, **{**values, "log_s": torch.zeros(3)}, **options)
    with pytest.raises(ValueError, match="sign goes with"):
        lu_layer(x, **values, **{**options, "sign": torch.ones(4)})
    with pytest.raises(RuntimeError, match="index outside"):
        lu_layer(x, **values, columns=torch.tensor([0, 1, 2, 4]))
