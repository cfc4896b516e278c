"""The data-dependent start of ActNorm: what it computes, and a flag that survives everything."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nfkernels import nn as N


def moments(y):
    axes = [0, *range(2, y.dim())]
    return y.mean(axes), y.var(axes, correction=0)


@pytest.mark.parametrize("shape", [(16, 3), (8, 3, 5), (8, 3, 4, 2)])
def test_first_training_batch_is_whitened(shape):
    x = 3 * torch.randn(shape) - 7
    layer = N.ActNorm(3)
    mean, var = moments(layer(x)[0])
    torch.testing.assert_close(mean, torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(var, torch.ones(3), atol=1e-4, rtol=0)
    before = layer.log_scale.clone()
    layer(5 * x)
    assert torch.equal(layer.log_scale, before), "only the first batch counts"


def test_form():
    layer = N.ActNorm(2)
    with torch.no_grad():
        layer.log_scale.copy_(torch.tensor([0.5, -1.0]))
        layer.bias.copy_(torch.tensor([1.0, 2.0]))
    x = torch.randn(3, 2, 4)
    y, logdet = layer.eval()(x)
    torch.testing.assert_close(y, torch.exp(layer.log_scale)[:, None] * x + layer.bias[:, None])
    torch.testing.assert_close(logdet, torch.full((3,), 4 * -0.5))


def test_evaluation_before_training_is_the_identity():
    layer = N.ActNorm(2).eval()
    x = torch.randn(4, 2)
    y, logdet = layer(x)
    assert torch.equal(y, x)
    assert not logdet.any()
    assert not layer.initialized
    layer.train()(x)
    assert layer.initialized


def test_explicit_initialisation_works_in_eval_mode():
    layer = N.ActNorm(2).eval()
    x = 4 * torch.randn(64, 2) + 1
    y = layer.initialize(x)
    assert layer.initialized
    torch.testing.assert_close(moments(y)[1], torch.ones(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(layer(x)[0], y)


def test_a_constant_channel_gives_no_nan_and_no_explosion():
    x = torch.randn(32, 3, 2, 2)
    x[:, 1] = 0.25
    layer = N.ActNorm(3)
    y, logdet = layer(x)
    assert torch.isfinite(y).all()
    assert torch.isfinite(logdet).all()
    assert torch.equal(y[:, 1], torch.zeros(32, 2, 2))
    assert layer.log_scale[1] == 0
    only = N.ActNorm(1)
    y, _ = only(torch.full((4, 1), 3.0))
    assert torch.equal(y, torch.zeros(4, 1))
    assert torch.equal(only.log_scale, torch.zeros(1))


@pytest.mark.parametrize("value", [0.3, -7.7, 1e5])
def test_a_constant_channel_is_only_shifted(value):
    """A later pixel that differs moves by what it differs, not by ten thousand times that."""
    x = torch.randn(500, 3, 3, 3)
    x[:, 1] = value
    layer = N.ActNorm(3)
    y, _ = layer(x)
    assert torch.equal(y[:, 1], torch.zeros(500, 3, 3))
    later = x.clone()
    later[0, 1, 0, 0] += 0.5
    torch.testing.assert_close(layer(later)[0][0, 1, 0, 0], torch.tensor(0.5), atol=1e-2, rtol=0)
    alone = N.ActNorm(1)
    assert torch.equal(alone(x[:, 1:2])[0], torch.zeros(500, 1, 3, 3)), "rounding is not a standard deviation"
    assert torch.equal(alone.log_scale, torch.zeros(1))
    steps = N.GlowSteps(3, 1, 4)
    steps(x)
    assert steps.log_scale[0, 1] == 0
    assert steps.log_scale.abs().max() < 1


def test_a_channel_that_hardly_varies_keeps_its_scale():
    x = torch.randn(64, 2) * torch.tensor([1.0, 5e-5])
    layer = N.ActNorm(2)
    layer(x)
    assert layer.log_scale[1] == 0
    torch.testing.assert_close(N.ActNorm(1)(x[:, 1:])[0].std(correction=0), torch.tensor(1.0), atol=1e-3, rtol=0)


@pytest.mark.parametrize("make", [lambda: N.ActNorm(4), lambda: N.GlowSteps(4, 2, 5)], ids=["actnorm", "steps"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_start_refuses_what_is_not_finite(make, bad):
    layer = make()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    x = torch.randn(3, 4, 2, 2)
    poisoned = x.clone()
    poisoned[1, 2, 0, :] = bad
    name = type(layer).__name__
    for start in (layer, layer.initialize):
        with pytest.raises(ValueError, match=f"^{name} cannot start from this batch: 2 of 16 values are NaN or inf"):
            start(poisoned)
        assert not layer.initialized
        for key, value in layer.state_dict().items():
            assert torch.equal(value, before[key]), key
    assert torch.isfinite(layer(x)[0]).all()
    assert layer.initialized
    with pytest.raises(ValueError, match="cannot start from this batch: its variance overflows"):
        make()(1e30 * x)


def test_steps_that_fail_half_way_leave_nothing_behind():
    layer = N.GlowSteps(4, 2, 5)
    with torch.no_grad():
        layer.bias3[1] = float("nan")  # of the first network: the first ActNorm starts well, the second cannot
    with pytest.raises(ValueError, match="GlowSteps cannot start from this batch"):
        layer(torch.randn(3, 4, 2, 2))
    assert not layer.initialized
    assert not layer.log_scale.any()


def test_padding_may_hold_anything_at_the_start():
    x = torch.randn(2, 2, 4)
    x[0, :, 2:] = float("nan")
    layer = N.ActNorm(2)
    assert torch.isfinite(layer(x, lengths=torch.tensor([2, 4]))[0]).all()


def test_inside_an_inverse_it_is_initialised_alone():
    layer = N.ActNorm(2)
    swapped = N.Chain(N.Inverse(N.Chain(layer)))
    x = torch.randn(64, 2) * 3 + 1
    with pytest.raises(ValueError, match="ActNorm inside an Inverse cannot start from data that meets its output"):
        swapped.initialize(x)
    assert torch.equal(swapped.train()(x)[0], x)
    assert not layer.initialized
    swapped[0].inv.initialize(x)
    torch.testing.assert_close(swapped.initialize(torch.zeros(1, 2)), x.mean(0, keepdim=True), atol=1e-5, rtol=1e-5)


def test_one_sample_of_one_pixel():
    y, logdet = N.ActNorm(2)(torch.randn(1, 2, 1, 1))
    assert torch.isfinite(y).all()
    assert torch.isfinite(logdet).all()


def test_padding_does_not_count():
    x, lengths = torch.randn(6, 2, 10) + 3, torch.tensor([10, 3, 5, 1, 7, 2])
    valid = torch.arange(10) < lengths[:, None]
    x = x * valid[:, None]
    y, _ = N.ActNorm(2)(x, lengths=lengths)
    inside = y.transpose(1, 2)[valid]
    torch.testing.assert_close(inside.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(inside.var(0, correction=0), torch.ones(2), atol=1e-4, rtol=0)
    assert not y.transpose(1, 2)[~valid].any()


def test_an_empty_first_batch_does_not_initialise():
    layer = N.ActNorm(2)
    layer(torch.randn(0, 2))
    assert not layer.initialized
    assert torch.isfinite(layer.log_scale).all()


def trained():
    layer = N.ActNorm(2)
    layer(torch.randn(16, 2) * 3 + 2)
    return layer


def through_state_dict(layer):
    new = N.ActNorm(2)
    new.load_state_dict(layer.state_dict())
    return new


def through_assignment_onto_meta(layer):
    with torch.device("meta"):
        new = N.ActNorm(2)
    new.load_state_dict(layer.state_dict(), assign=True)
    return new


def through_a_file(layer):
    with torch.no_grad():
        path = f"{through_a_file.folder}/layer.safetensors"
    N.save(layer, path)
    return N.load(path)


def through_buffers_filled_in_place(layer):
    new = N.ActNorm(2)
    with torch.no_grad():
        for a, b in zip([*new.parameters(), *new.buffers()], [*layer.parameters(), *layer.buffers()], strict=True):
            a.copy_(b)
    return new


@pytest.mark.parametrize(
    "way",
    [
        copy.deepcopy,
        through_state_dict,
        through_assignment_onto_meta,
        through_a_file,
        through_buffers_filled_in_place,
        lambda layer: layer.to(torch.float64).float(),
        lambda layer: N.Chain(layer)[0],
    ],
    ids=["deepcopy", "state_dict", "meta", "file", "buffers", "to", "chain"],
)
def test_the_flag_survives(way, tmp_path):
    through_a_file.folder = tmp_path
    layer = trained()
    kept = layer.log_scale.detach().clone()
    new = way(layer).train()
    assert new.initialized
    new(torch.randn(16, 2) * 50)
    torch.testing.assert_close(new.log_scale.detach(), kept, msg="a loaded layer must not start again")


def test_an_uninitialised_layer_is_loaded_as_such():
    layer = trained()
    layer.load_state_dict(N.ActNorm(2).state_dict())
    x = torch.randn(64, 2) * 9
    torch.testing.assert_close(moments(layer.train()(x)[0])[1], torch.ones(2), atol=1e-4, rtol=0)


def test_compiled_training_starts_it_too():
    torch._dynamo.reset()
    layer = N.ActNorm(2)
    x = torch.randn(64, 2) * 9
    y, _ = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(moments(y)[1], torch.ones(2), atol=1e-4, rtol=0)
    assert layer.initialized


def test_forward_after_the_start_reads_nothing_on_the_host(monkeypatch):
    layer = N.Chain(trained(), N.GlowSteps(2, 1, 4)).train()
    x = torch.randn(8, 2, 2, 2)
    layer(x)
    for name in ("item", "tolist", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a host read"))
    # CPU tensors may be looked at by __bool__ (the singular matrix); a device other than the CPU may not.
    monkeypatch.setattr("nfkernels.nn.linear_bijection.reads_values", lambda x: False)
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda *_: pytest.fail("a host read"))
    layer(x)


def worker(rank: int, address: str, queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.manual_seed(0)
    data = torch.randn(12, 4, 2, 2) * 3 + 1
    # Unequal shares: the statistics are those of all samples, not the mean of two means.
    layer, steps = N.ActNorm(4), N.GlowSteps(4, 2, 4)
    mine = data[:3] if rank == 0 else data[3:]
    # What one rank may not start from, none starts from: no rank waits for another that has raised.
    try:
        layer(mine / (1 - rank))
        refused = None
    except ValueError as error:
        refused = str(error)
    layer(mine)
    steps(mine)
    values = [v.tolist() for v in (layer.log_scale, layer.bias, steps.log_scale, steps.bias)]
    queue.put((rank, refused, values))
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_replicas_start_equal_from_the_global_batch(tmp_path):
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [context.Process(target=worker, args=(rank, f"file://{tmp_path}/store", queue)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    found, refused = {}, {}
    for _ in range(2):
        rank, refused[rank], found[rank] = queue.get()
    assert refused[0] == "ActNorm cannot start from this batch: another rank's part is not finite"
    assert refused[1].startswith("ActNorm cannot start from this batch: 16 of 16 values are NaN or infinite")
    torch.manual_seed(0)
    data = torch.randn(12, 4, 2, 2) * 3 + 1
    layer, steps = N.ActNorm(4), N.GlowSteps(4, 2, 4)
    layer(data)
    steps(data)
    for rank in range(2):
        for got, expected in zip(found[rank], (layer.log_scale, layer.bias, steps.log_scale, steps.bias), strict=True):
            torch.testing.assert_close(torch.tensor(got), expected.detach(), atol=1e-5, rtol=1e-5)
