"""What accelerate promises, for every layer that an adapter serves (tests/integrations/foreign lists them)."""

import copy
import io
import pickle
import re
import warnings

import pytest
import torch
from foreign import cases, loss_of
from torch.utils._pytree import tree_flatten

from nfkernels.integrations import accelerate, restore
from nfkernels.integrations.swap import is_swapped, original_of

ALL = cases()
EVERY = pytest.mark.parametrize("case", ALL, ids=str)


def _some(found, share):
    """Of the forms of one layer the first, and of these one in ``share``; the others are exhaustive."""
    layers = list(dict.fromkeys(re.match(r"[^\[ ,(]+", case.name)[0] for case in found))
    wanted, seen = set(layers[::share]), set()
    for case in found:
        layer = re.match(r"[^\[ ,(]+", case.name)[0]
        keep = layer in wanted and layer not in seen
        yield case if keep else pytest.param(case, marks=pytest.mark.exhaustive)
        seen.add(layer)


ONE_OF_EACH = pytest.mark.parametrize("case", list(_some(ALL, 1)), ids=str)
STEPS = pytest.mark.parametrize("steps", [25, pytest.param(100, marks=pytest.mark.exhaustive)])
ONE_IN_TWO = pytest.mark.parametrize("case", list(_some(ALL, 2)), ids=str)
A_FEW = pytest.mark.parametrize("case", list(_some(ALL, 3)), ids=str)


def _built(case, dtype=torch.float32):
    torch.manual_seed(0)
    module = case.make()
    torch.manual_seed(1)
    inputs = _as(case.inputs(), dtype)
    # Off the starting point, where many layers are the identity; initialised, where the first batch does that.
    case.call(module.to(dtype), *inputs)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    return module, inputs


def _as(inputs, dtype):
    return tuple(v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for v in inputs)


def _accelerated(case, dtype=torch.float32):
    """The module, its accelerated twin, of which was reported what is expected, and inputs."""
    module, inputs = _built(case, dtype)
    twin = copy.deepcopy(module)
    report = accelerate(twin, inputs, call=case.call)
    found = {row.path: (row.status, row.reason) for row in report}
    for path in case.layers if dtype == torch.float32 or "float64" not in case.skip else ():
        assert found[path][0] == case.status, f"{path}: {found[path]}"
        assert is_swapped(twin.get_submodule(path)) == (case.status == "fused")
    return module, twin, inputs


def _leaves(out):
    return tree_flatten(out)[0]


def _values(case, module, inputs):
    out = case.call(module, *inputs)
    back = case.inverse(module, out, *inputs) if case.inverse else ()
    return out, back


def _close(got, expected, tolerance):
    """The same structure, shapes and types; values to ``tolerance`` of the largest."""
    assert tree_flatten(got)[1] == tree_flatten(expected)[1]
    for g, e in zip(_leaves(got), _leaves(expected)):
        if not torch.is_tensor(e):
            assert type(g) is type(e)
            assert g == e
            continue
        assert (g.shape, g.dtype) == (e.shape, e.dtype)
        scale = 1 + (e.abs().max() if e.numel() else 0)
        torch.testing.assert_close(g, e, rtol=0, atol=float(tolerance * scale))


@EVERY
def test_same_values_and_gradients_in_float64(case):
    check_values_and_gradients(case, torch.float64)


@ONE_OF_EACH
def test_same_values_and_gradients_in_float32(case):
    check_values_and_gradients(case, torch.float32)


def check_values_and_gradients(case, dtype):
    plain, fused, inputs = _accelerated(case, dtype)
    tolerance = 1e-9 if dtype == torch.float64 else 3e-4
    results = []
    for module in (plain, fused):
        given = tuple(v.clone().requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v for v in inputs)
        out, back = _values(case, module, given)
        live = [t for t in _leaves(out) if torch.is_tensor(t) and t.requires_grad]
        loss = loss_of(out) if live else None
        wanted = [v for v in given if torch.is_tensor(v) and v.requires_grad]
        wanted += [p for p in module.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True) if live else ()
        results.append(((out, back), list(grads)))
    with torch.no_grad():
        _close(results[1][0], results[0][0], tolerance)
        _close(results[1][1], results[0][1], 10 * tolerance)


@ONE_OF_EACH
def test_proved_at_the_first_call_without_example_inputs(case):
    module, inputs = _built(case)
    expected = case.call(copy.deepcopy(module), *inputs)
    report = accelerate(module)
    assert {row.status for row in report if row.path in case.layers} == {
        "pending" if case.status == "fused" else case.status
    }
    got = case.call(module, *inputs)
    assert {row.status for row in report if row.path in case.layers} == {case.status}
    _close(got, expected, 3e-4)


@ONE_IN_TWO
def test_everything_else_stays(case):
    plain, fused, _ = _accelerated(case)
    assert type(fused).__name__ == type(plain).__name__
    assert isinstance(fused, type(plain))
    assert repr(fused) == repr(plain)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert vars(fused).keys() == vars(plain).keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(fused.state_dict()[name], value), name
    classes = [original_of(type(m)) for m in fused.modules()]
    assert classes == [type(m) for m in plain.modules()]
    swapped = sum(is_swapped(m) for m in fused.modules())
    assert restore(fused) == swapped
    assert [type(m) for m in fused.modules()] == classes


@ONE_IN_TWO
def test_copies_are_fused_and_pickles_are_the_original(case):
    plain, fused, inputs = _accelerated(case)
    expected = case.call(fused, *inputs)
    twin = copy.deepcopy(fused)
    assert [type(m) for m in twin.modules()] == [type(m) for m in fused.modules()]
    _close(case.call(twin, *inputs), expected, 0)
    for name, p in twin.named_parameters():
        assert p is not dict(fused.named_parameters())[name]
    try:
        pickle.dumps(plain)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        pytest.skip(f"the original cannot be pickled: {error}")
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    assert b"nfkernels" not in buffer.getvalue()
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)  # written two lines above
    assert not any(is_swapped(m) for m in loaded.modules())
    _close(case.call(loaded, *inputs), expected, 3e-4)
    # A state_dict goes from one to the other.
    fused.load_state_dict(plain.state_dict())
    _close(case.call(fused, *inputs), expected, 3e-4)


@ONE_IN_TWO
def test_hooks_fire(case):
    _, fused, inputs = _accelerated(case)
    seen = []
    handle = fused.register_forward_hook(lambda module, args, out: seen.append(type(out)))
    case.call(fused, *inputs)
    handle.remove()
    layers = dict(fused.named_modules())
    direct = [m for m in layers.values() if is_swapped(m)]
    if not direct:
        pytest.skip("kept as it is")
    handles = [m.register_forward_pre_hook(lambda module, args: seen.append(module)) for m in direct]
    out = case.call(fused, *inputs)
    if case.inverse:
        case.inverse(fused, out, *inputs)
    for handle in handles:
        handle.remove()


def _train(case, module, inputs, steps, lr=3e-4):
    """The losses. The step is small: a loss with kinks (a spline's, at its knots) draws elements onto them, and on
    which side one then lies is a matter of the last bit, in the original too."""
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=lr)
    losses = []
    torch.manual_seed(2)
    for _ in range(steps):
        loss = loss_of(case.call(module, *inputs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def _trainable(case):
    if "train" in case.skip:
        pytest.skip(case.skip["train"])
    module, inputs = _built(case)
    if not any(p.requires_grad for p in module.parameters()):
        pytest.skip("nothing to train")
    return module, inputs


@STEPS
@ONE_OF_EACH
def test_same_training_in_float64(case, steps):
    _trainable(case)
    plain, fused, inputs = _accelerated(case, torch.float64)
    expected, got = _train(case, plain, inputs, steps), _train(case, fused, inputs, steps)
    assert torch.isfinite(expected).all()
    assert ((got - expected).abs() / expected.abs().clamp(min=1)).max() <= 1e-9


@STEPS
@A_FEW
def test_same_training_in_float32(case, steps):
    """As near to the original as the original is to itself when one weight moves by one unit in the last place."""
    _trainable(case)
    plain, fused, inputs = _accelerated(case)
    base, got = (_train(case, m, inputs, steps) for m in (copy.deepcopy(plain), fused))
    scale = base.abs().clamp(min=1)
    deviation = ((got - base).abs() / scale).max()
    allowed = 16 * torch.finfo(torch.float32).eps  # roundings of the loss itself are no deviation
    for name, p in list(plain.named_parameters())[:6]:
        if deviation <= allowed:
            break
        if not p.requires_grad:
            continue
        nudged = copy.deepcopy(plain)
        with torch.no_grad():
            weight = nudged.get_parameter(name).view(-1)
            at = weight.abs().argmax()
            weight[at] = torch.nextafter(weight[at], torch.tensor(torch.inf))
        own = ((_train(case, nudged, inputs, steps) - base).abs() / scale).max()
        allowed = max(allowed, float(3 * own))
    assert deviation <= allowed


@ONE_IN_TWO
def test_second_derivatives(case):
    if "double" in case.skip:
        pytest.skip(case.skip["double"])
    plain, fused, inputs = _accelerated(case, torch.float64)
    found = []
    for module in (plain, fused):
        x = inputs[0].clone().requires_grad_()
        out = case.call(module, x, *inputs[1:])
        loss = loss_of(out)
        if not loss.requires_grad:
            pytest.skip("no gradient")
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        second = g.square().sum()
        wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
        found.append(list(torch.autograd.grad(second, wanted, allow_unused=True, materialize_grads=True)))
    _close(found[1], found[0], 1e-7)


@A_FEW
def test_torch_func(case):
    """Per-sample gradients by functional_call, grad and vmap, where the original can do them."""
    if "func" in case.skip:
        pytest.skip(case.skip["func"])
    plain, fused, inputs = _accelerated(case, torch.float64)

    def gradients(module):
        weights = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
        fixed = {n: b.detach() for n, b in module.named_buffers()}

        def loss(weights, *rows):
            class Called(torch.nn.Module):
                def __init__(self):
                    super().__init__()
                    self.inner = module

                def forward(self, *rows):
                    return loss_of(case.call(self.inner, *rows))

            named = {f"inner.{n}": t for n, t in {**weights, **fixed}.items()}
            return torch.func.functional_call(Called(), named, rows)

        return torch.func.grad(loss)(weights, *inputs)

    try:
        expected = gradients(plain)
    except Exception as error:
        pytest.skip(f"the original cannot: {type(error).__name__}")
    _close(gradients(fused), expected, 1e-8)


@ONE_OF_EACH
def test_autocast_keeps_data_and_logdet_in_float32(case):
    if "autocast" in case.skip:
        pytest.skip(case.skip["autocast"])
    plain, fused, inputs = _accelerated(case)
    exact = case.call(plain, *inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = case.call(fused, *inputs)
        back = case.inverse(fused, out, *inputs) if case.inverse else None
    if case.status != "fused":
        pytest.skip("kept as it is")
    for got, want in zip(_leaves(out), _leaves(exact)):
        if torch.is_tensor(want) and want.is_floating_point():
            assert got.dtype == torch.float32
    if back is not None and torch.is_tensor(inputs[0]) and "inverse" not in case.skip:
        first = next(t for t in _leaves(back) if torch.is_tensor(t))
        if first.shape == inputs[0].shape:
            assert (first - inputs[0]).abs().max() < 1e-3 * (1 + inputs[0].abs().max())


def _graphs(case, module, inputs):
    torch._dynamo.reset()
    found = torch._dynamo.explain(lambda *given: case.call(module, *given))(*inputs)
    return found.graph_break_count


@A_FEW
def test_compiles_with_no_more_graph_breaks(case):
    if "compile" in case.skip:
        pytest.skip(case.skip["compile"])
    plain, fused, inputs = _accelerated(case)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        after = _graphs(case, fused, inputs)
    before = _graphs(case, plain, inputs) if after else 0
    torch._dynamo.reset()
    ours = [str(w.message) for w in told if "lru_cache" in str(w.message) and "nfkernels" in str(w.message)]
    assert not ours, "keep constants on the specialised class: torch.compile warns of functools.cache"
    assert after <= before
    if case.status == "fused" and len(case.layers) == 1:
        assert after == 0, f"{after} graph breaks (the original: {before})"
