"""Layers of other libraries on a GPU: proved there, the same numbers, and nothing that the host waits for."""

import copy

import pytest
import torch
from foreign import cases, loss_of
from torch.utils._pytree import tree_flatten

from nfkernels import accelerate

EVERY = pytest.mark.parametrize("case", cases(), ids=str)


def _on_gpu(case):
    torch.manual_seed(0)
    module = case.make().cuda()
    inputs = tuple(v.cuda() if torch.is_tensor(v) else v for v in case.inputs())
    case.call(module, *inputs)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    plain = copy.deepcopy(module)
    report = accelerate(module, inputs, call=case.call)
    found = {row.path: (row.status, row.reason) for row in report}
    for path in case.layers:
        assert found[path][0] == case.status, f"{path}: {found[path]}"
    return plain, module, inputs


@pytest.mark.gpu
@EVERY
def test_same_values_and_gradients_on_a_gpu(case):
    plain, fused, inputs = _on_gpu(case)
    results = []
    for module in (plain, fused):
        out = case.call(module, *inputs)
        tensors = [t for t in tree_flatten(out)[0] if torch.is_tensor(t)]
        live = [p for p in module.parameters() if p.requires_grad]
        loss = loss_of(out)
        grads = torch.autograd.grad(loss, live, allow_unused=True) if live and loss.requires_grad else []
        results.append([t.detach() for t in tensors] + [g for g in grads if g is not None])
    assert len(results[0]) == len(results[1])
    for got, want in zip(results[1], results[0]):
        assert got.shape == want.shape
        assert (got - want).abs().max() <= 2e-3 * (1 + want.abs().max())


@pytest.mark.gpu
@EVERY
def test_the_host_never_waits_for_a_fused_layer(case):
    """Where there is no inverse by passes: what a layer computes can be captured in a CUDA graph."""
    _, fused, inputs = _on_gpu(case)
    if case.status != "fused" or "capture" in case.skip:
        pytest.skip(case.skip.get("capture", "kept as it is"))
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            expected = case.call(fused, *inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        got = case.call(fused, *inputs)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(tree_flatten(got)[0], tree_flatten(expected)[0]):
        if torch.is_tensor(a):
            assert torch.equal(a, b)
