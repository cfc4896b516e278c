"""Philox4x32-10: published vectors, the same bits everywhere, independence of layout, keys, rough statistics."""

import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nfkernels import use_backend
from nfkernels.ops import _library, advance_, philox_uniform, random_key
from nfkernels.reference import philox
from nfkernels.reference.dequantize import forward as dequantize_reference

INCLUDE = Path(__file__).parents[2] / "csrc/include"

# Random123 1.14, tests/kat_vectors, "philox4x32 10": counter, key, words.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def signed(low: int, high: int) -> int:
    value = high << 32 | low
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_published_vectors(counter, key, words):
    got = philox.words([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert tuple(int(w) for w in got) == words


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_op_begins_with_the_first_published_vector(backend):
    with use_backend(backend):
        u = philox_uniform(torch.empty(4, dtype=torch.float64), random_key(0))
    assert [int(v * 2**24) for v in u] == [w >> 8 for w in VECTORS[0][2]]


def test_kernels_header(tmp_path):
    """csrc/include/philox.h, which the CPU and the CUDA kernels share: the vectors, and indices beyond 2^32."""
    counters = [(signed(*c[:2]), signed(*c[2:]), signed(*k)) for c, k, _ in VECTORS]
    counters += [(2**30 + 5, 7, -3), (2**32 - 1, 0, 1), (2**32, 0, 1), (2**61, -1, 2**63 - 1)]
    source = tmp_path / "words.cpp"
    source.write_text(
        '#include "philox.h"\n#include <cstdio>\n#include <cstdlib>\n'
        "int main(int n, char** v) {\n"
        "  for (int i = 1; i + 2 < n; i += 3) {\n"
        "    const int64_t key[2] = {std::atoll(v[i + 2]), std::atoll(v[i + 1])};\n"
        "    const nf::PhiloxWords w = nf::philox(std::atoll(v[i]), nf::philox_key(key));\n"
        '    std::printf("%u %u %u %u\\n", w.a, w.b, w.c, w.d);\n'
        "  }\n}\n"
    )
    build = ["g++", "-std=c++17", "-O1", f"-I{INCLUDE}", str(source), "-o", str(tmp_path / "words")]
    try:
        subprocess.run(build, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no g++ here")
    run = [tmp_path / "words", *(str(n) for c in counters for n in c)]
    lines = subprocess.run(run, check=True, capture_output=True, text=True).stdout.split("\n")
    got = [tuple(int(w) for w in line.split()) for line in lines if line]
    assert got[:3] == [words for _, _, words in VECTORS]
    for (index, offset, seed), words in zip(counters[3:], got[3:], strict=True):
        want = philox.uniform((4,), torch.tensor([seed, offset]), torch.float64, start=4 * index)
        assert [w >> 8 for w in words] == (want * 2**24).tolist()


def test_index_beyond_32_bits_carries():
    key = random_key(5)
    around = philox.uniform((64,), key, torch.float32, start=2**34 - 32)
    assert torch.equal(around[32:], philox.uniform((32,), key, torch.float32, start=2**34))
    assert not torch.equal(around[32:], philox.uniform((32,), key, torch.float32))
    for start in (1, 2, 3, 2**34 - 1):  # starts that no call begins at
        whole = philox.uniform((40,), key, torch.float32, start=start - start % 4)
        assert torch.equal(philox.uniform((30,), key, torch.float32, start=start), whole[start % 4 :][:30])


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5, 7), (2, 3, 8, 8), (0, 4), (1000, 3), (2, 3, 200, 101)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_bits_on_every_backend_and_layout(shape, dtype):
    key = advance_(random_key(-12345), 2**40 + 1)
    like = torch.empty(shape, dtype=dtype)
    want = philox.uniform(shape, key, torch.float64)
    layouts = [like]
    if like.dim() > 1:
        layouts += [like.transpose(0, 1).contiguous().transpose(0, 1), like[:1].expand(shape)]
    if like.dim() == 4:
        layouts.append(like.contiguous(memory_format=torch.channels_last))
    for given_ in layouts:
        for backend in ("native", "reference"):
            with use_backend(backend):
                got = philox_uniform(given_, key)
            assert got.dtype == dtype
            assert torch.equal(got.double(), want)
        if given_.is_contiguous(memory_format=torch.channels_last) or given_.is_contiguous():
            assert got.stride() == given_.stride()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_stride_and_key(data):
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    order = data.draw(st.permutations(range(len(shape))))
    like = torch.empty([shape[i] for i in order]).permute([order.index(i) for i in range(len(shape))])
    word = st.integers(-(2**63), 2**63 - 1)
    key = torch.tensor([data.draw(word), data.draw(word)])
    with use_backend("native"):
        got = philox_uniform(like, key)
    assert torch.equal(got, philox.uniform(shape, key, torch.float32))


@pytest.mark.parametrize("shape", [(64, 3, 32, 32), (70, 5), (1, 3, 300, 301)])
def test_same_bits_for_any_number_of_threads(shape):
    outcomes = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            outcomes.append(philox_uniform(torch.empty(shape), random_key(1)))
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(outcomes[0], other) for other in outcomes[1:])


def test_seed_and_offset_change_everything():
    """Streams that differ in one bit of the key agree no more often than chance."""
    like = torch.empty(20_000)
    base = torch.tensor([0, 0])
    first = philox_uniform(like, base)
    for entry in (0, 1):
        for bit in (0, 1, 31, 32, 63):
            key = base.clone()
            key[entry] = signed(1 << bit & 0xFFFFFFFF, 1 << bit >> 32)
            other = philox_uniform(like, key)
            assert (other == first).sum() <= 1
            assert abs(torch.corrcoef(torch.stack([first, other]))[0, 1]) < 4 / 20_000**0.5


def test_statistics():
    n = 1 << 20
    u = philox_uniform(torch.empty(n, dtype=torch.float64), random_key(2024))
    assert u.min() >= 0
    assert u.max() < 1
    assert torch.equal((u * 2**24).floor(), u * 2**24)
    assert abs(u.mean() - 0.5) < 4 * (1 / 12 / n) ** 0.5
    assert abs(u.var() - 1 / 12) < 4 * (1 / 180 / n) ** 0.5
    for buckets in (256, 1000):
        counts = torch.histc(u, buckets, 0, 1)
        chi = ((counts - n / buckets) ** 2 / (n / buckets)).sum()
        assert abs(chi - (buckets - 1)) < 4 * (2 * (buckets - 1)) ** 0.5
    low = (u * 2**24).long() & 255  # the low bits are as good as the high ones
    chi = ((torch.bincount(low, minlength=256) - n / 256) ** 2 / (n / 256)).sum()
    assert abs(chi - 255) < 4 * 510**0.5
    for lag in (1, 2, 3, 4, 1024):
        assert abs(torch.corrcoef(torch.stack([u[lag:], u[:-lag]]))[0, 1]) < 4 / n**0.5


def test_keys():
    key = random_key(-3)
    assert key.dtype == torch.int64
    assert key.tolist() == [-3, 0]
    assert advance_(key) is key
    advance_(key, 5)
    assert key.tolist() == [-3, 6]
    assert random_key(torch.tensor(7).item()).tolist() == [7, 0]
    with pytest.raises(ValueError, match="a seed is an int64"):
        random_key(2**63)
    with pytest.raises(TypeError):
        random_key(0.5)
    with pytest.raises(ValueError, match="a key is int64"):
        advance_(torch.zeros(3, dtype=torch.int64))


def test_a_key_is_read_where_it_lies():
    """No value of it reaches Python: fake tensors, which have none, pass through."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        key = advance_(random_key(1, device="cuda"))
        like = torch.empty(2, 3, 4, 4, device="cuda").to(memory_format=torch.channels_last)
        u = philox_uniform(like, key)
        assert (u.device.type, u.stride()) == ("cuda", like.stride())
        y, logdet = dequantize_reference(u, key, None, 256.0, 0.1, torch.float32)
        assert y.device.type == logdet.device.type == "cuda"


def test_machinery():
    key = random_key(3)
    for like in (torch.empty(2, 3), torch.empty(2, 4, 3, 3, dtype=torch.float64).to(memory_format=torch.channels_last)):
        torch.library.opcheck(torch.ops.nfkernels._philox_uniform_forward, (like, key))

    def draw(like, key):
        return philox_uniform(like, key) + philox_uniform(like, advance_(key))

    like, first, second = torch.empty(3, 5), random_key(3), random_key(3)
    got = torch.compile(draw, fullgraph=True, backend="aot_eager")(like, first)
    assert torch.equal(got, draw(like, second))
    assert first.tolist() == second.tolist() == [3, 1]
    keys = torch.tensor([[1, 0], [2, 0], [3, 9]])
    mapped = torch.func.vmap(lambda k: philox_uniform(torch.empty(4), k))(keys)
    assert torch.equal(mapped, torch.stack([philox_uniform(torch.empty(4), k) for k in keys]))
    x = torch.ones(3, requires_grad=True)
    assert not philox_uniform(x, key).requires_grad
    assert "_philox_uniform_forward" in _library.op_names()


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("float32 or float64", lambda: philox_uniform(torch.empty(2, dtype=torch.int64), random_key(0))),
        ("float32 or float64", lambda: philox_uniform(torch.empty(2).bfloat16(), random_key(0))),
        ("a key is int64", lambda: philox_uniform(torch.empty(2), torch.zeros(2))),
        ("a key is int64", lambda: philox_uniform(torch.empty(2), torch.zeros(1, 2, dtype=torch.int64))),
        ("key is on meta", lambda: philox_uniform(torch.empty(2), random_key(0, device="meta"))),
    ],
)
def test_errors_name_what_was_wrong(message, call):
    with pytest.raises(ValueError, match=message):
        call()
