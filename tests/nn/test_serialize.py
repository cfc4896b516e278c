"""Saving and loading: one file, no pickle, whole or not at all, and a sentence for every other file."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import struct

import pytest
import safetensors.torch
import torch

from nfkernels import ScaleMap, models
from nfkernels import nn as N


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
    refused("does not describe a flow that this program can build")
    write(content, {k: v[:1] if "loc" in k else v for k, v in tensors.items()})
    refused("size mismatch")
    write({**content, "config": {**content["config"], "args": {"nonsense": 1}}})
    refused("does not describe a flow that this program can build")

    with pytest.raises(FileNotFoundError):
        N.load(tmp_path / "missing")
    with pytest.raises(N.CheckpointError, match="holds a Flow, not a Glow"):
        models.Glow.load(good)


def test_device_argument(tmp_path):
    small_flow().save(tmp_path / "f")
    assert next(N.load(tmp_path / "f", device="cpu").parameters()).device.type == "cpu"
