"""nflows' conditioner networks: what is left to the original, and hooks."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("nflows", reason="nflows is not installed")
from nflows.nn.nets import MLP, ResidualNet

import nfkernels
from nfkernels.nn import dense


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: ResidualNet(3, 7, 12, use_batch_norm=True), "batch normalization"),
        (lambda: ResidualNet(3, 7, 12, activation=F.gelu), "activation 'gelu'"),
        (lambda: ResidualNet(3, 7, 300), "300 hidden features"),
        (lambda: ResidualNet(3, 7, 12, num_blocks=0), "a network without blocks"),
        (lambda: MLP((3,), (5,), [16, 8]), "hidden layers of several widths"),
        (lambda: MLP((3,), (5,), [16], activate_output=True), "an activation of its output"),
        (lambda: MLP((3, 2), (5,), [16]), "inputs or outputs that are not vectors"),
    ],
)
def test_what_is_kept_says_why(make, reason):
    net = make()
    report = nfkernels.accelerate(net)
    assert reason in report.kept[0].reason
    assert type(net).__mro__[0].__qualname__ == type(net).__qualname__


def fused(net, *inputs, monkeypatch):
    """Whether a call is one call."""
    made = []
    monkeypatch.setattr(dense, "run", lambda *args: made.append(1) or dense_run(*args))
    with torch.no_grad():
        out = net(*inputs)
    return bool(made), out


dense_run = dense.run


def test_one_call_unless_something_wants_the_layers(monkeypatch):
    net, x = ResidualNet(3, 7, 12, dropout_probability=0.5), torch.randn(9, 3)
    net.eval()
    want = net(x)
    assert nfkernels.accelerate(net, x).fused
    once, y = fused(net, x, monkeypatch=monkeypatch)
    assert once
    torch.testing.assert_close(y, want)
    net.train()
    assert not fused(net, x, monkeypatch=monkeypatch)[0]  # dropout
    net.eval()
    seen = []
    handle = net.blocks[1].linear_layers[0].register_forward_hook(lambda *_: seen.append(1))
    once, y = fused(net, x, monkeypatch=monkeypatch)
    assert seen
    assert not once
    torch.testing.assert_close(y, want)
    handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        once, y = fused(net, x, monkeypatch=monkeypatch)
    assert not once
    assert y.dtype == torch.bfloat16
    torch.nn.utils.parametrizations.weight_norm(net.final_layer)
    assert not fused(net, x, monkeypatch=monkeypatch)[0]


def test_what_does_not_fit_is_told_by_torch():
    net = ResidualNet(3, 7, 12)
    nfkernels.accelerate(net, torch.randn(9, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        net(torch.randn(9, 4))
    with pytest.raises(RuntimeError, match="dtype"):
        net(torch.randn(9, 3, dtype=torch.float64))


def test_block_hooks_are_called(monkeypatch):
    """Of a block, which a fused network does not call either."""
    net, x, seen = ResidualNet(3, 7, 12), torch.randn(9, 3), []
    nfkernels.accelerate(net, x)
    net.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    net(x)
    assert seen
