"""dense_net: the kernels against plain PyTorch in float64, gradients, contexts, threads, errors."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from nfkernels import use_backend
from nfkernels.ops import _library, dense_net
from nfkernels.ops.dense_net import _backward

ACTIVATIONS = ("relu", "leaky_relu", "elu", "tanh", "silu", "softplus")
KINDS = [(True, "none"), (True, "gate"), (True, "add"), (False, "none"), (False, "add")]
EPS = {torch.float64: 2.3e-16, torch.float32: 1.2e-7}


def network(inputs, hidden, outputs, middle, dtype=torch.float32):
    weights = []
    for height, width in ((hidden, inputs), *[(hidden, hidden)] * middle, (outputs, hidden)):
        weights += [torch.randn(height, width, dtype=dtype) / width**0.5, torch.randn(height, dtype=dtype)]
    return weights


def shares_of(batch, hidden, middle, residual, share, dtype=torch.float32):
    count = {"none": 0, "gate": middle // 2, "add": middle // 2 + 1 if residual else 1}[share]
    return torch.randn(batch, count * hidden, dtype=dtype) if count else None


def run(x, weights, shares, dy, upcast=False, **options):
    wide = (lambda t: t.detach().double()) if upcast else (lambda t: t.detach())
    x, weights = wide(x).requires_grad_(), [wide(w).requires_grad_() for w in weights]
    leaves = [x, *weights]
    if shares is not None:
        shares = wide(shares).requires_grad_()
        leaves.append(shares)
    y = dense_net(x, weights, shares=shares, **options)
    with torch.no_grad():
        assert torch.equal(y, dense_net(x, weights, shares=shares, **options))
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def against_reference(x, weights, shares, **options):
    dy = torch.randn(x.shape[0], weights[-1].shape[0], dtype=x.dtype)
    got = run(x, weights, shares, dy, **options)
    with use_backend("reference"):
        plain, exact = run(x, weights, shares, dy, **options), run(x, weights, shares, dy, True, **options)
    for a, b, c in zip(got, plain, exact, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if a.numel():
            slack = 8 * EPS[a.dtype] * c.abs().max().clamp(min=1) * max(x.shape[0], weights[0].shape[0]) ** 0.5
            assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + slack


def written_out(x, weights, residual, activation, shares, share):
    """As the documentation has it."""
    act = getattr(F, activation)
    parts = [] if shares is None else list(shares.split(weights[0].shape[0], 1))
    h = F.linear(x, *weights[:2])
    if share == "add":
        h = h + parts.pop(0)
    middle = weights[2:-2]
    if not residual:
        for i in range(0, len(middle), 2):
            h = F.linear(act(h), *middle[i : i + 2])
        return F.linear(act(h), *weights[-2:])
    for i in range(0, len(middle), 4):
        t = F.linear(act(F.linear(act(h), *middle[i : i + 2])), *middle[i + 2 : i + 4])
        if share == "gate":
            t = t * parts.pop(0).sigmoid()
        if share == "add":
            t = t + parts.pop(0)
        h = h + t
    return F.linear(h, *weights[-2:])


@pytest.mark.covering
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(("residual", "share"), KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_is_what_is_documented(backend, residual, share, activation):
    """Values and every gradient, against autograd of the written-out network, in float64."""
    weights = [w.requires_grad_() for w in network(3, 7, 5, 4, torch.float64)]
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    shares = shares_of(6, 7, 4, residual, share, torch.float64)
    leaves = [x, *weights] if shares is None else [x, *weights, shares.requires_grad_()]
    with use_backend(backend):
        got = dense_net(x, weights, residual=residual, activation=activation, shares=shares, share=share)
        want = written_out(x, weights, residual, activation, shares, share)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)  # torch's softplus is linear from 20 on
        dy = torch.randn_like(want)
        gradients = torch.autograd.grad(got, leaves, dy), torch.autograd.grad(want, leaves, dy)
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("batch", [0, 1, 5, 6, 7, 48, 49, 97, 300])
@pytest.mark.parametrize(("residual", "share"), KINDS)
def test_native_matches_every_size(batch, residual, share):
    sizes = [(1, 1, 1, 2), (5, 64, 115, 4), (2, 17, 23, 2), (9, 50, 3, 4), (16, 32, 16, 6), (3, 130, 40, 2)]
    for i, (inputs, hidden, outputs, middle) in enumerate(sizes):
        dtype = (torch.float32, torch.float64)[(i + batch) % 2]
        weights = network(inputs, hidden, outputs, middle, dtype)
        shares = shares_of(batch, hidden, middle, residual, share, dtype)
        x = torch.randn(batch, 2 * inputs, dtype=dtype)[:, ::2] if i % 2 else torch.randn(batch, inputs, dtype=dtype)
        activation = ACTIVATIONS[(i + batch) % 6]
        against_reference(x, weights, shares, residual=residual, activation=activation, share=share)


def test_a_perceptron_without_hidden_products():
    against_reference(torch.randn(20, 4), network(4, 10, 6, 0), None, residual=False)


@pytest.mark.parametrize("need", list(itertools.product([False, True], repeat=3)))
def test_what_is_needed(need):
    weights, shares, x = network(4, 10, 6, 4), torch.randn(60, 20), torch.randn(60, 4)
    saved = torch.ops.nfkernels._dense_net_forward(x, shares, weights, True, 3, 1, True)[1]
    dy = torch.randn(60, 6)
    args = dy, x, shares, saved, weights, True, 3, 1, *need
    got, plain = _backward.on("native", *args), _backward.on("reference", *args)
    for a, b in zip((*got[:2], *got[2]), (*plain[:2], *plain[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert [t.numel() > 0 for t in got[:2]] == list(need[:2])
    assert bool(got[2]) == need[2]


def test_only_what_asks_gets_a_gradient():
    weights, x = network(4, 10, 6, 4), torch.randn(30, 4)
    weights[2].requires_grad_()
    dense_net(x, weights).sum().backward()
    assert weights[2].grad is not None
    assert all(w.grad is None for i, w in enumerate(weights) if i != 2)


def test_threads_do_not_change_a_bit():
    weights, x = [w.requires_grad_() for w in network(5, 64, 115, 4)], torch.randn(700, 5)
    found, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            y = dense_net(x, weights)
            found.append((y, *torch.autograd.grad(y.square().sum(), weights)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@pytest.mark.parametrize(("residual", "share"), KINDS)
def test_second_derivatives_and_transforms(residual, share):
    weights = network(3, 4, 2, 2, torch.float64)
    x = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    shares = shares_of(3, 4, 2, residual, share, torch.float64)
    options = {"residual": residual, "activation": "tanh", "shares": shares, "share": share}
    weights[0].requires_grad_()

    def f(x, w):
        return dense_net(x, [w, *weights[1:]], **options)

    assert torch.autograd.gradcheck(f, (x, weights[0]))
    assert torch.autograd.gradgradcheck(f, (x, weights[0]))
    jacobian = torch.func.jacrev(lambda x: f(x, weights[0].detach()))(x.detach())
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(lambda x: f(x, weights[0]), x))


def test_a_nan_stays_one():
    for activation in ACTIVATIONS:
        x = torch.randn(12, 3)
        x[4, 1] = float("nan")
        y = dense_net(x, network(3, 8, 4, 2), activation=activation)
        assert y[4].isnan().all()
        assert not y[[0, 1, 2, 3, 5, 6]].isnan().any()


def test_compiled():
    weights, x = network(3, 8, 4, 2), torch.randn(12, 3)
    made = torch.compile(lambda x: dense_net(x, weights), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(made(x), dense_net(x, weights))


def test_info_says_who_serves():
    assert _library.serving("_dense_net_forward", "cpu")[0] == "native"
    assert _library.serving("_dense_net_forward", "cuda") == ("reference", "PyTorch's own products, layer by layer")


def test_errors_name_what_was_given():
    weights, x = network(3, 8, 4, 2), torch.randn(12, 3)
    with pytest.raises(ValueError, match=r"layer 0 must have a weight \[8, 2\]"):
        dense_net(x[:, :2], weights)
    with pytest.raises(ValueError, match=r"an even number of them for a residual net\), got 6 tensors"):
        dense_net(x, weights[:4] + weights[-2:])
    with pytest.raises(ValueError, match=r"x must be \[B, in\] in float32 or float64, got torch.bfloat16"):
        dense_net(x.bfloat16(), weights)
    with pytest.raises(ValueError, match=r"layer 0 is torch.float32 on cpu, but x is torch.float64"):
        dense_net(x.double(), weights)
    with pytest.raises(ValueError, match=r"shares must be torch.float32 \[12, 8\] for 1 shares"):
        dense_net(x, weights, shares=torch.zeros(12, 9), share="gate")
    with pytest.raises(ValueError, match="unknown activation 'gelu'"):
        dense_net(x, weights, activation="gelu")
