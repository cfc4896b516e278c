"""Streams, CUDA graphs, two devices, and no waiting for the device."""

import pytest
import torch
from bodies import ON_GPU, OPS, contender, direction_of, run, sample_of

from benchmarks.case import Case, Sample, needs_grad, prepare
from benchmarks.gate import compare, same_bits

SHAPES = [(4, 12, 32, 32), (300, 8)]


@pytest.mark.parametrize(("device", "backend"), ON_GPU)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_graph_replays_with_changed_inputs(name, shape, device, backend):
    op = OPS[name]
    case = Case(name, direction_of(op), shape)
    static = sample_of(op, case, device)
    c = contender(op, "", backend)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with c.context(needs_grad(case)):
        with torch.cuda.stream(stream):
            call = prepare(op, case, c.run, static)
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            outputs = call()
    for seed in (1, 2):
        fresh = sample_of(op, case, device, seed=seed)
        for key, value in fresh.inputs.items():
            static.inputs[key].copy_(value)
        for old, new in zip(static.cotangents, fresh.cotangents, strict=True):
            old.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(outputs, run(op, case, backend, fresh))


@pytest.mark.parametrize(("device", "backend"), ON_GPU)
@pytest.mark.parametrize("name", OPS)
def test_runs_on_the_current_stream(name, device, backend):
    """Inputs that a busy stream is still about to write are only read after it."""
    op = OPS[name]
    case = Case(name, direction_of(op), (4, 12, 64, 64))
    late = sample_of(op, case, device)
    blank = Sample({k: torch.zeros_like(v) if v.dim() > 2 else v for k, v in late.inputs.items()}, late.cotangents)
    want = run(op, case, backend, late)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for key, value in late.inputs.items():
            if value.dim() > 2:
                blank.inputs[key].copy_(value)
        got = run(op, case, backend, blank)
    stream.synchronize()
    assert same_bits(got, want)


@pytest.mark.parametrize(("device", "backend"), ON_GPU)
@pytest.mark.parametrize("name", OPS)
def test_a_device_that_is_not_the_current_one(name, device, backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    op = OPS[name]
    case = Case(name, direction_of(op), (3, 12, 16, 16))
    sample = sample_of(op, case, "cpu")
    with torch.cuda.device(0):
        results = []
        for where in ("cuda:0", "cuda:1"):
            moved = Sample({k: v.to(where) for k, v in sample.inputs.items()}, [t.to(where) for t in sample.cotangents])
            got = run(op, case, backend, moved)
            assert all(t.device == torch.device(where) for t in got)
            results.append([t.cpu() for t in got])
        assert torch.cuda.current_device() == 0
    assert compare(results[1], results[0], [t.double() for t in results[0]]).ok


@pytest.mark.parametrize(("device", "backend"), ON_GPU)
@pytest.mark.parametrize("name", OPS)
def test_the_host_never_waits(name, device, backend):
    op = OPS[name]
    case = Case(name, direction_of(op), (4, 12, 16, 16))
    sample = sample_of(op, case, device)
    run(op, case, backend, sample)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(op, case, backend, sample)
    finally:
        torch.cuda.set_sync_debug_mode(before)
