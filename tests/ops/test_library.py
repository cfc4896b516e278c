"""Dispatch: which backend serves, forcing one, the CUDA stub, a missing or foreign compiled module, import time."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from nfkernels import affine_coupling, use_backend
from nfkernels.ops import _library


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=os.environ | env, timeout=120
    )


# Makes `import nfkernels._C` find nothing, as after an installation without a compiler.
HIDE = """
import sys, importlib.abc
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "nfkernels._C":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda n, p=None: None if n == "nfkernels._C" else find(n, p)
"""


HIDE_TRITON = """
import importlib.util as util
find_any = util.find_spec
util.find_spec = lambda name, package=None: None if name == "triton" else find_any(name, package)
"""


def test_native_serves_the_cpu_here():
    """The suite is meant to run on the compiled module; without it, this says so."""
    assert _library.serving("_affine_coupling_forward", "cpu")[0] == "native"
    assert _library.serving("_affine_coupling_forward", "mps")[0] == "reference"


def test_without_the_module_the_reference_serves_and_says_so_once():
    done = python(
        HIDE
        + """
import warnings
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    import nfkernels.ops, torch
    y, logdet = nfkernels.affine_coupling(torch.ones(2, 4), torch.zeros(2, 4), identity="first")
    y, logdet = nfkernels.affine_coupling(torch.ones(2, 4), torch.zeros(2, 4), identity="first")
assert len([w for w in told if "several times slower" in str(w.message)]) == 1, told
print(nfkernels.ops._library.serving("_channel_mix_forward", "cpu"))
try:
    with nfkernels.use_backend("native"):
        nfkernels.channel_mix(torch.ones(1, 2), torch.eye(2))
except RuntimeError as error:
    print(error)
"""
    )
    assert done.returncode == 0, done.stderr
    assert "('reference', 'the compiled module nfkernels._C was not built')" in done.stdout
    assert "the native backend is not here: the compiled module nfkernels._C was not built" in done.stdout


def test_a_module_built_for_other_schemas_is_refused():
    done = python(
        """
        import sys, types, warnings
        warnings.simplefilter("ignore")
        fake = types.ModuleType("nfkernels._C")
        fake.schema_version, fake.register = 999, lambda: 1 / 0
        sys.modules["nfkernels._C"] = fake
        import nfkernels.ops
        print(nfkernels.ops._library.serving("_channel_mix_forward", "cpu"))
        """
    )
    assert done.returncode == 0, done.stderr
    assert "was built for op schemas 999, this package has" in done.stdout


@pytest.mark.parametrize("triton", [False, True])
def test_the_stub_settles_at_the_first_call_and_is_gone(triton):
    """The CUDA key's stub, tried on the CPU key of a process without the compiled module."""
    if triton and _library.triton_missing():
        pytest.skip("Triton is not installed")
    hide = "" if triton else HIDE_TRITON
    done = python(
        HIDE
        + hide
        + """
import warnings
warnings.simplefilter("ignore")
import nfkernels, torch
from nfkernels.ops import _library as lib
ops = [op for op in lib._state.ops.values() if op.cpu_only is None]
for op in ops:
    op.cuda_stub._destroy()
    op.cuda_stub = lib._install_stub(op, "CPU")
lib.settle_cuda.__defaults__ = ("CPU",)
x, w = torch.randn(2, 3, 4), torch.randn(3, 3)
y = nfkernels.channel_mix(x, w)
assert torch.allclose(y, torch.einsum("oc,bcp->bop", w, x), atol=1e-5)
assert all(op.cuda_stub is None for op in lib._state.ops.values())
print({op.cuda_serves for op in ops}, lib.serving("_channel_mix_forward", "cuda"))
y, logdet = nfkernels.affine_coupling(x[:, :2], torch.zeros(2, 4, 4))
assert torch.allclose(y, x[:, :2] * torch.sigmoid(torch.tensor(2.0)), atol=1e-6)
""",
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stderr
    assert ("{'triton'}" if triton else "{'reference'}") in done.stdout


def test_triton_does_not_serve_cpu_tensors():
    with use_backend("triton"), pytest.raises(RuntimeError, match="triton backend"):
        affine_coupling(torch.ones(1, 2), torch.zeros(1, 4))


def test_backward_follows_its_forward():
    """A graph made under one backend keeps it, wherever backward is called."""
    calls = []
    op = _library._state.ops["_affine_coupling_backward"]
    original = op.reference
    op.reference = lambda *a: calls.append(1) or original(*a)
    try:
        x = torch.ones(1, 2, requires_grad=True)
        with use_backend("reference"):
            y, _ = affine_coupling(x, torch.zeros(1, 4))
        y.sum().backward()
        assert calls == [1]
        y, _ = affine_coupling(x, torch.zeros(1, 4))
        with use_backend("reference"):
            y.sum().backward()
        assert calls == [1]
    finally:
        op.reference = original


def test_fake_tensors_on_a_device_that_is_not_here():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 4, 8, 8, device="cuda").to(memory_format=torch.channels_last)
        y, logdet = affine_coupling(x, torch.empty(2, 4, 8, 8, device="cuda"), identity="first")
        assert y.device.type == logdet.device.type == "cuda"
        assert y.stride() == x.stride()


@pytest.mark.slow
def test_import_is_quick():
    """A small part of what torch's own import takes; up to three tries on a machine that may be busy."""
    code = """
        import time
        start = time.perf_counter()
        import torch
        middle = time.perf_counter()
        import nfkernels.models
        print((time.perf_counter() - middle) / (middle - start))
    """
    shares = []
    while len(shares) < 3 and min(shares, default=1) >= 0.3:
        shares.append(float(python(code).stdout))
    assert min(shares) < 0.3, f"{shares} of torch's"


def test_import_brings_nothing_heavy():
    """torch itself brings tqdm along where it is installed; that is not ours to count."""
    code = "import sys, torch; before = set(sys.modules); import nfkernels.models; print(*(set(sys.modules) - before))"
    brought = {name.split(".")[0] for name in python(code).stdout.split()}
    assert "nfkernels" in brought
    assert not brought & {"triton", "sklearn", "matplotlib", "PIL", "tqdm", "scipy", "pytest"}


def test_the_package_itself_brings_no_torch():
    """What makes `nfkernels --help` answer at once, and Ctrl-C in the first second harmless."""
    done = python("import sys, nfkernels, nfkernels.cli; print('torch' in sys.modules); nfkernels.affine_coupling")
    assert done.stdout.strip() == "False", done.stdout + done.stderr
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there():
    import nfkernels

    for name in nfkernels.__all__:
        assert getattr(nfkernels, name) is not None
    assert set(nfkernels.__all__) <= set(dir(nfkernels))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        nfkernels.nonsense  # noqa: B018


def test_threads_that_meet_the_stub_together():
    """Eight threads make the first call at once; the queries before the choice are slow."""
    done = python(
        """
import threading, time
import nfkernels, torch
from nfkernels.ops import _library as lib
ops = [op for op in lib._state.ops.values() if op.cpu_only is None]
for op in ops:
    op.cuda_stub._destroy()
    op.cuda_stub = lib._install_stub(op, "CPU")
lib.settle_cuda.__defaults__ = ("CPU",)
lib._is_on_cuda = lambda x: True
choice = lib._cuda_choice
lib._cuda_choice = lambda: (time.sleep(0.1), ("reference", "a test"))[1]
together, wrong = threading.Barrier(8), []
x, w = torch.randn(2, 3, 4), torch.randn(3, 3)
want = torch.einsum("oc,bcp->bop", w, x)
def call():
    together.wait()
    try:
        if not torch.allclose(nfkernels.channel_mix(x, w), want, atol=1e-5):
            wrong.append("another result")
    except BaseException as error:
        wrong.append(repr(error))
threads = [threading.Thread(target=call) for _ in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
assert not wrong, wrong
assert all(op.cuda_stub is None for op in lib._state.ops.values())
"""
    )
    assert done.returncode == 0, done.stderr


FAKE_CUDA = """
    import sys, types
    import nfkernels, torch
    from nfkernels.ops import _library as lib

    registered = []
    fake = types.ModuleType("nfkernels._C_cuda")
    fake.schema_version = lib.SCHEMA_VERSION + ({wrong})
    fake.architectures = "sm_90"
    fake.register = lambda: registered.append(1)
    fake.why_unusable = lambda device: {why!r} if device == 1 else None
    sys.modules["nfkernels._C_cuda"] = fake
    torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 2
    print(lib.serving("_channel_mix_forward", "cuda"))
    lib.settle_cuda()
    print(lib.serving("_channel_mix_forward", "cuda"))
    print("registered", registered)
    try:
        lib._forced_implementation(lib._state.ops["_channel_mix_forward"], "native", torch.device("cuda"))
        print("native forced")
    except RuntimeError as error:
        print(error)
"""


@pytest.mark.parametrize(
    ("why", "wrong", "served", "said"),
    [
        (None, 0, "native", "sm_90"),
        ("the driver is too old", 0, "triton", "cuda:1: the driver is too old"),
        (None, 1, "triton", "built for op schemas"),
    ],
)
def test_cuda_module_serves_where_every_device_can_run_it(why, wrong, served, said):
    if _library.triton_missing() is not None:
        pytest.skip("Triton is not installed")
    done = python(FAKE_CUDA.format(why=why, wrong=wrong))
    assert done.returncode == 0, done.stderr
    before, after, registered, forced = done.stdout.strip().splitlines()
    assert before == after
    assert before.startswith(f"('{served}'")
    assert said in before
    assert registered == f"registered {[1] if served == 'native' else []}"
    assert forced == "native forced" if served == "native" else said in forced
