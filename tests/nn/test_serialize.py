"""Saving and loading: one file, no pickle, whole or not at all, and a sentence for every other file."""

from __future__ import annotations

import copy
import inspect
import json
import math
import os
import pickle
import struct
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch

from nfkernels import ScaleMap, models
from nfkernels import nn as N
from nfkernels.nn.serialize import _TORCH


def small_flow():
    return N.Flow(N.Chain(N.ActNorm(2), N.AffineCoupling(N.MLP(1, 4, 2))), N.DiagonalNormal(2)).eval()


def test_flow_round_trip(tmp_path):
    flow, x = small_flow(), torch.randn(6, 2)
    flow.initialize(x)
    flow.save(tmp_path / "flow.safetensors")
    for loaded in (N.Flow.load(tmp_path / "flow.safetensors"), N.load(str(tmp_path / "flow.safetensors"))):
        assert torch.equal(loaded.log_prob(x), flow.log_prob(x))
        assert loaded.bijection[0].initialized
    assert os.listdir(tmp_path) == ["flow.safetensors"], "no temporary file stays"


def test_every_option_of_a_glow_comes_back(tmp_path):
    flow = models.Glow(
        (1, 8, 8), levels=2, steps=[2, 1], hidden=8, classes=3, grey_levels=17, dropout=0.2, dropout_of="channel",
        kernel=1, last_kernel=3, scale_map=ScaleMap.realnvp(1.7), order="scale_first", class_width=5,
    )  # fmt: skip
    images, labels = torch.randint(0, 17, (4, 1, 8, 8), dtype=torch.uint8), torch.tensor([0, 1, 2, 0])
    flow.nll(images, labels)
    flow.save(tmp_path / "glow")
    loaded = models.Glow.load(tmp_path / "glow")
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(loaded(x, labels)[0], flow.eval()(x, labels)[0])
    steps = loaded.bijection[1].levels[0][1]
    assert (steps.dropout, steps.dropout_of, steps.scale_map) == (0.2, "channel", ScaleMap.realnvp(1.7))
    assert steps.scale_map.clamp == 1.7
    assert (loaded.grey_levels, loaded.classes) == (17, 3)


def test_infinite_constants_and_dtypes_survive(tmp_path):
    coupling = N.AffineCoupling(N.MLP(1, 4, 2), scale_map=ScaleMap("exp", clamp=math.inf)).double()
    N.save(coupling, tmp_path / "c")
    loaded = N.load(tmp_path / "c")
    assert loaded.scale_map == coupling.scale_map
    assert loaded.conditioner.first.weight.dtype == torch.float64


def test_torchs_own_modules(tmp_path):
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, (3, 1), padding="same", bias=False), torch.nn.GroupNorm(2, 4), torch.nn.GELU("tanh"),
        torch.nn.Dropout(0.25), torch.nn.Sequential(torch.nn.LeakyReLU(0.3), torch.nn.Conv2d(4, 2, 1)),
        torch.nn.Identity(),
    )  # fmt: skip
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p))
    layer = N.AffineCoupling(network).eval()
    N.save(layer, tmp_path / "layer")
    loaded, x = N.load(tmp_path / "layer"), torch.randn(2, 2, 5, 4)
    assert torch.equal(loaded(x)[0], layer(x)[0])
    assert str(loaded) == str(layer)
    other = torch.nn.ModuleList(
        [
            torch.nn.Linear(3, 2, bias=False), torch.nn.Embedding(4, 3, padding_idx=1), torch.nn.LayerNorm((2, 3), 0.1),
            torch.nn.Conv1d(2, 4, 3, stride=2, dilation=2, groups=2, padding_mode="circular", padding=1),
            torch.nn.BatchNorm1d(3, momentum=0.3), torch.nn.BatchNorm2d(3, affine=False), torch.nn.Dropout2d(0.1),
            torch.nn.ELU(0.5), torch.nn.SiLU(True), torch.nn.Tanh(), torch.nn.Sigmoid(), torch.nn.Softplus(2.0, 10.0),
            torch.nn.Flatten(2), torch.nn.Unflatten(1, (2, 3)), torch.nn.ReLU(),
        ]
    )  # fmt: skip
    N.save(other, tmp_path / "list")
    assert str(N.load(tmp_path / "list")) == str(other.eval())


def test_shared_modules_stay_shared(tmp_path):
    network = N.MLP(1, 4, 2)
    chain = N.Chain(N.AffineCoupling(network), N.AffineCoupling(network, identity="second"))
    N.save(chain, tmp_path / "chain")
    loaded = N.load(tmp_path / "chain")
    assert loaded[0].conditioner is loaded[1].conditioner


def test_one_module_in_two_places_of_a_sequence(tmp_path):
    act, square = torch.nn.ReLU(), torch.nn.Linear(3, 3)
    network = torch.nn.Sequential(torch.nn.Linear(3, 3), act, square, act, square, act)
    N.save(network, tmp_path / "n")
    loaded, x = N.load(tmp_path / "n"), torch.randn(5, 3)
    assert torch.equal(loaded(x), network(x))
    assert len(loaded) == 6
    assert loaded[1] is loaded[3] is loaded[5]
    assert loaded[2] is loaded[4]
    N.save(torch.nn.ModuleList([act, square, act]), tmp_path / "n")
    assert len(N.load(tmp_path / "n")) == 3


def test_names_in_a_sequence(tmp_path):
    act = torch.nn.Tanh()
    network = torch.nn.Sequential(
        OrderedDict(first=torch.nn.Linear(2, 2), act=act, last=torch.nn.Linear(2, 2), end=act)
    )
    N.save(network, tmp_path / "n")
    loaded, x = N.load(tmp_path / "n"), torch.randn(5, 2)
    assert torch.equal(loaded(x), network(x))
    assert [name for name, _ in loaded.named_children()] == ["first", "act", "last"]
    assert loaded.end is loaded.act


# What no default is, by argument; None where the class must be constructed in a way of its own.
OTHER = {
    "bias": False, "padding": 1, "stride": 2, "dilation": 2, "groups": 2, "padding_mode": "reflect", "padding_idx": 1,
    "max_norm": 0.1, "norm_type": 1.0, "scale_grad_by_freq": True, "sparse": True, "eps": 0.5, "momentum": 0.3,
    "elementwise_affine": False, "affine": False, "track_running_stats": False, "p": 0.1, "inplace": True,
    "negative_slope": 0.3, "alpha": 0.5, "approximate": "tanh", "beta": 2.0, "threshold": 3.0, "start_dim": 2,
    "end_dim": 2,
}  # fmt: skip
SIZES = {
    "in_features": 4, "out_features": 4, "in_channels": 4, "out_channels": 4, "kernel_size": 3, "num_embeddings": 4,
    "embedding_dim": 4, "normalized_shape": (4,), "num_groups": 2, "num_channels": 4, "num_features": 4, "dim": 1,
    "unflattened_size": (2, 2),
}  # fmt: skip
NOT_OPTIONS = {"device", "dtype", "_weight", "_freeze", "args", "kwargs", "modules"}


@pytest.mark.parametrize("name", list(_TORCH))
def test_every_option_of_torchs_modules_comes_back(tmp_path, name):
    cls = _TORCH[name][0]
    names = [n for n in inspect.signature(cls).parameters if n not in NOT_OPTIONS]
    sizes = {n: SIZES[n] for n in names if n in SIZES}
    for option in (n for n in names if n not in SIZES):
        module = cls(**sizes, **{option: OTHER[option]})
        N.save(module, tmp_path / "m")
        loaded = N.load(tmp_path / "m")
        assert [k for k, v in vars(module).items() if repr(v) != repr(vars(loaded)[k]) and k not in STATE] == [], option
        assert module.state_dict().keys() == loaded.state_dict().keys(), option


STATE = {"training", "_parameters", "_buffers"}


def test_options_that_change_a_result(tmp_path):
    table = torch.nn.Embedding(3, 4, max_norm=0.1, norm_type=1.0)
    N.save(table, tmp_path / "m")
    x = torch.tensor([0, 2])
    assert torch.equal(N.load(tmp_path / "m")(x), table(x))
    network = torch.nn.Sequential(torch.nn.LayerNorm(4, bias=False), torch.nn.LayerNorm((2, 4), 0.1, bias=False))
    N.save(network, tmp_path / "m")
    assert torch.equal(N.load(tmp_path / "m")(x.new_ones(2, 2, 4).float()), network(x.new_ones(2, 2, 4).float()))


def changed_flow(change):
    flow = N.Flow(N.Chain(N.ActNorm(2), N.AffineCoupling(N.MLP(1, 4, 2))), N.StandardNormal(2))
    change(flow)
    return flow


def set_scale_map(flow):
    flow.bijection[1].scale_map = ScaleMap.realnvp(2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.bijection.layers.append(N.ActNorm(2)), r"its part 'bijection.layers.2' \(ActNorm\) was added"),
        (lambda f: f.bijection.layers.append(N.Squeeze(1)), r"its part 'bijection.layers.2' \(Squeeze\) was added"),
        (lambda f: f.bijection.layers.pop(1), r"its part 'bijection.layers.1' \(AffineCoupling\) was taken out"),
        (
            lambda f: setattr(f, "base", N.DiagonalNormal(2)),
            "its part 'base' is a DiagonalNormal, but was constructed as",
        ),
        (lambda f: setattr(f, "base", N.Uniform(2)), "its part 'base' is a Uniform, but was constructed as"),
        (lambda f: setattr(f, "embed", torch.nn.Identity()), "its 'embed' was changed after construction"),
        (set_scale_map, "'scale_map' of its part 'bijection.layers.1' was changed"),
        (
            lambda f: torch.nn.utils.parametrizations.weight_norm(f.bijection[1].conditioner.first),
            "its part 'bijection.layers.1.conditioner.first' got parametrizations",
        ),
        (
            lambda f: setattr(f.bijection[1].conditioner, "first", torch.nn.Linear(1, 4, bias=False)),
            "'bias' of its part 'bijection.layers.1.conditioner.first' was changed",
        ),
        (
            lambda f: setattr(f.bijection[0], "bias", torch.nn.Parameter(torch.zeros(1))),
            r"the tensor 'bijection.layers.0.bias' has shape \(1,\), but was constructed as \(2,\)",
        ),
        (
            lambda f: f.bijection[0].register_buffer("more", torch.ones(1)),
            "the tensor 'bijection.layers.0.more' was added",
        ),
        (
            lambda f: f.bijection[0]._buffers.pop("initialized"),
            "the tensor 'bijection.layers.0.initialized' was taken out",
        ),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, change, message):
    path = tmp_path / "flow"
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match="cannot save Flow: " + message) as found:
        changed_flow(change).save(path)
    assert "construct a flow with the parts it is to have" in str(found.value)
    assert path.read_bytes() == b"before"


def test_parametrizations_in_a_sequence_and_in_a_constructor(tmp_path):
    plain = torch.nn.Sequential(torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"cannot save Sequential.\*\[0\]: it got parametrizations after construction"):
        N.save(plain, tmp_path / "no")

    @N.register(name="tests.Normed")
    class Normed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 2))

    layer, x = Normed(), torch.randn(3, 2)
    N.save(layer, tmp_path / "n")
    assert torch.equal(N.load(tmp_path / "n").layer(x), layer.layer(x))


def test_constructors_that_refuse_their_own_arguments_now(tmp_path):
    @N.register(name="tests.Once")
    class Once(torch.nn.Module):
        made = 0

        def __init__(self) -> None:
            super().__init__()
            Once.made += 1
            if Once.made > 1:
                raise RuntimeError("only once")

    with pytest.raises(ValueError, match=r"cannot save Once: its constructors refuse .* \(only once\)"):
        N.save(Once(), tmp_path / "no")


def test_what_is_done_to_an_argument_later_does_not_count(tmp_path):
    layers = [N.ActNorm(2)]
    chain = N.Chain(layers)
    layers.append(N.ActNorm(2))
    N.save(chain, tmp_path / "c")
    assert len(N.load(tmp_path / "c")) == 1
    shape = [[4, 1, 1]]
    levels = N.MultiScale([N.Squeeze(2)], shape)
    shape[0][0] = 8
    N.save(levels, tmp_path / "c")
    assert N.load(tmp_path / "c").shapes == [(4, 1, 1)]


def test_generators_and_views_as_arguments(tmp_path):
    for layers in ((N.ActNorm(2) for _ in range(3)), {i: N.ActNorm(2) for i in range(3)}.values()):
        N.save(N.Chain(layers), tmp_path / "c")
        assert len(N.load(tmp_path / "c")) == 3


def test_numpys_numbers_and_sizes(tmp_path):
    chain = N.Chain(N.ActNorm(np.int64(2)), N.Standardize(np.float32(0.5), np.float64(2.0)))
    flow = N.Flow(chain, N.Uniform(torch.Size([2]), np.float64(-1.0), 2 * np.float32(1)))
    flow.save(tmp_path / "f")
    loaded = N.load(tmp_path / "f")
    assert (loaded.bijection[0].channels, loaded.base.shape) == (2, torch.Size([2]))
    assert (loaded.base.low, loaded.base.high) == (-1.0, 2.0)
    N.save(N.MultiScale([N.Squeeze(2)], [torch.Size((4, 1, 1))]), tmp_path / "f")
    assert N.load(tmp_path / "f").shapes == [(4, 1, 1)]


def test_frozen_parameters_stay_frozen(tmp_path):
    flow = small_flow()
    flow.bijection[0].bias.requires_grad_(False)
    flow.save(tmp_path / "f")
    loaded = N.load(tmp_path / "f")
    expected = {name: name != "bijection.layers.0.bias" for name, _ in flow.named_parameters()}
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == expected


def test_saving_draws_no_random_numbers(tmp_path):
    flow, state = small_flow(), torch.random.get_rng_state()
    flow.save(tmp_path / "f")
    N.load(tmp_path / "f")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_inherited_constructors_of_ones_own(tmp_path):
    class Parent(torch.nn.Module):
        def __init__(self, by: float = 0.0) -> None:
            super().__init__()
            self.by = by

    child = N.register(type("Child", (Parent,), {}), name="tests.Child")
    N.save(child(0.5), tmp_path / "c")
    assert N.load(tmp_path / "c").by == 0.5


def test_nesting_and_folders(tmp_path):
    with pytest.raises(N.CheckpointError, match="is a folder, not a file that nfkernels wrote"):
        N.load(tmp_path)
    for depth in (300, 5000, 200_000):
        for deep in ('{"dict": {"a": ' * depth + "1" + "}}" * depth, "[" * depth + "]" * depth):
            text = f'{{"format": 1, "config": {{"module": "Squeeze", "id": 0, "args": {{"factor": {deep}}}}}}}'
            safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "deep", metadata={"nfkernels": text})
            with pytest.raises(N.CheckpointError):
                N.load(tmp_path / "deep")
    module = torch.nn.Identity()
    for _ in range(2000):
        module = torch.nn.Sequential(module)
    with pytest.raises(ValueError, match="cannot save Sequential: its parts are nested too deeply"):
        N.save(module, tmp_path / "no")


def test_a_copy_saves_itself(tmp_path):
    flow = small_flow()
    twin = copy.deepcopy(flow)
    with torch.no_grad():
        twin.base.loc.add_(1)
    twin.save(tmp_path / "twin")
    assert torch.equal(N.load(tmp_path / "twin").base.loc, flow.base.loc + 1)


def test_classes_of_ones_own(tmp_path):
    @N.register(name="tests.Shift")
    class Shift(torch.nn.Module):
        def __init__(self, *sizes: int, by: float = 0.0, **rest) -> None:
            super().__init__()
            self.sizes, self.by, self.rest = sizes, by, rest

        def forward(self, x):
            return torch.full((x.shape[0], 2), self.by)

    layer = N.AffineCoupling(Shift(3, 4, by=0.5, names=["a"], table={"k": (1, None)}))
    N.save(layer, tmp_path / "layer")
    loaded = N.load(tmp_path / "layer").conditioner
    assert (loaded.sizes, loaded.by, loaded.rest) == ((3, 4), 0.5, {"names": ["a"], "table": {"k": (1, None)}})

    class Other(torch.nn.Module):
        pass

    with pytest.raises(ValueError, match=r"the name 'tests\.Shift' is taken by"):
        N.register(Other, name="tests.Shift")
    with pytest.raises(ValueError, match=r"cannot save AffineCoupling.conditioner: .*Other is a module that nfkernels"):
        N.save(N.AffineCoupling(Other()), tmp_path / "no")
    with pytest.raises(ValueError, match=r"cannot save Shift.by: no way to write a object to a file"):
        N.save(Shift(by=object()), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_full_disk_keeps_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "flow.safetensors"
    flow = small_flow()
    flow.save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with torch.no_grad():
        flow.base.loc.add_(1)
    with pytest.raises(OSError, match="No space left on device"):
        flow.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["flow.safetensors"]


def header(path):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length])["__metadata__"]


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def test_foreign_and_damaged_files(tmp_path):
    good = tmp_path / "good"
    small_flow().save(good)
    path = tmp_path / "bad"

    def refused(match):
        with pytest.raises(N.CheckpointError, match=match) as found:
            N.load(path)
        assert str(path) in str(found.value)
        assert len(str(found.value).splitlines()) <= 4

    path.write_bytes(pickle.dumps(Evil()))
    refused("is not a whole safetensors file")
    torch.save(Evil(), path)
    refused("is not a whole safetensors file")
    path.write_bytes(b"")
    refused("is not a whole safetensors file")
    path.write_bytes(good.read_bytes()[:-5])
    refused("is not a whole safetensors file")
    safetensors.torch.save_file({"a": torch.zeros(2)}, path)
    refused("not one that nfkernels wrote")

    tensors = safetensors.torch.load_file(good)
    content = json.loads(header(good)["nfkernels"])

    def write(content, tensors=tensors):
        text = content if isinstance(content, str) else json.dumps(content)
        safetensors.torch.save_file(tensors, path, metadata={"nfkernels": text})

    write("{")
    refused("has a damaged configuration")
    write([])
    refused("has a damaged configuration")
    write({**content, "format": 99})
    refused("has format 99, this nfkernels reads format 1: update nfkernels")
    write({**content, "config": {"module": "os.system", "id": 0, "args": {"*": {"tuple": ["true"]}}}})
    refused("made of a class 'os.system' that this program does not know")
    write({**content, "config": 3})
    refused("describes no module")
    write(content, {k: v for k, v in tensors.items() if "loc" not in k})
    refused("lacks 1 of its flow's 12 tensors, 'base.loc' among them")
    write(content, {k: v[:1] if "loc" in k else v for k, v in tensors.items()})
    refused("has the wrong shape of 1 of its flow.s 12 tensors")
    write({**content, "config": {**content["config"], "args": {"nonsense": 1}}})
    refused("does not describe a flow that this program can build")

    with pytest.raises(FileNotFoundError):
        N.load(tmp_path / "missing")
    with pytest.raises(N.CheckpointError, match="holds a Flow, not a Glow"):
        models.Glow.load(good)


def test_device_argument(tmp_path):
    small_flow().save(tmp_path / "f")
    assert next(N.load(tmp_path / "f", device="cpu").parameters()).device.type == "cpu"


@pytest.mark.parametrize("loader", ["nfkernels.load", "nfkernels.nn.Flow.load"])
def test_a_glow_loads_in_a_process_that_never_imported_the_models(loader, tmp_path):
    models.Glow((1, 4, 4), levels=1, steps=1, hidden=4).save(tmp_path / "glow.safetensors")
    code = f"import nfkernels.nn, sys; print(type({loader}(sys.argv[1])).__name__)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "glow.safetensors")], capture_output=True, text=True
    )
    assert done.stdout.strip() == "Glow", done.stderr
