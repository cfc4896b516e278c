"""The op library: schemas, and which kernel serves them.

PyTorch's dispatcher is the table. A schema is defined here from Python, so the op, its fake rule and its reference
exist without any compiled module. ``nfkernels._C`` fills the CPU key. The CUDA key starts as a stub that, on its first
call, looks at the devices, removes itself and installs the best backend there is: ``nfkernels._C_cuda``, else Triton,
else the reference. Any other device gets the reference.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.autograd import forward_ad

# Raised whenever a schema below changes; a compiled module built for another number is refused.
SCHEMA_VERSION = 5

Backend = Literal["reference", "triton", "native"]
BACKENDS = ("reference", "triton", "native")

_LIBRARY = torch.library.Library("nfkernels", "DEF")
_SETTLING = threading.Lock()


@dataclass
class Op:
    """One raw op and its implementations; calling it runs the backend that serves, or the one that is forced."""

    name: str
    reference: Callable[..., Any]
    overload: Any
    cuda_stub: torch.library.Library | None = None
    cuda_serves: str = "not called yet"
    cpu_only: str | None = None  # no kernels but the CPU's: what stands in for them elsewhere

    def __call__(self, *args: Any) -> Any:
        return self.on(_state.forced, *args)

    def on(self, backend: str | None, *args: Any) -> Any:
        """Calls one backend, None for whichever serves: a backward asks for the one that its forward ran on."""
        if backend is None:
            # Before the stub is met: it must not vanish while another thread is inside it. A trace never meets it.
            if not torch.compiler.is_compiling() and self.cuda_stub is not None and _is_on_cuda(args[0]):
                settle_cuda()
            return self.overload(*args)
        return _forced_implementation(self, backend, args[0].device)(*args)


@dataclass
class _State:
    forced: str | None = None
    cpu_missing: str | None = None  # why nfkernels._C does not serve, None when it does
    cuda_reason: str = "no CUDA op was called yet"
    ops: dict[str, Op] = field(default_factory=dict)


_state = _State()


def define(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cpu_only: str | None = None,
) -> Op:
    """Defines ``nfkernels::name``, with its reference for every device and its fake (shape) rule.

    ``cpu_only``: the op has a kernel on the CPU alone; a phrase on what stands in for it elsewhere.
    """
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nfkernels::{name}", fake, lib=_LIBRARY)
    op = Op(name, reference, getattr(torch.ops.nfkernels, name).default, cpu_only=cpu_only)
    if cpu_only is None:
        op.cuda_stub = _install_stub(op)
    else:
        op.cuda_serves = "reference"
    _state.ops[name] = op
    return op


# --- forcing a backend ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Forces one backend for every op called inside, in eager mode: ``"reference"``, ``"triton"`` or ``"native"``.

    Process-wide; meant for tests and benchmarks. Gradients of what was computed inside follow the same backend. Raises
    ``ValueError`` for an unknown name and ``RuntimeError`` at the call that the backend cannot serve.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}")
    previous, _state.forced = _state.forced, name
    try:
        yield
    finally:
        _state.forced = previous


def forced_backend() -> str | None:
    return _state.forced


def _forced_implementation(op: Op, backend: str, device: torch.device) -> Callable[..., Any]:
    if backend == "reference":
        return op.reference
    if op.cpu_only is not None and (backend == "triton" or device.type != "cpu"):
        raise RuntimeError(f"{op.name} has kernels on the CPU alone: elsewhere it is {op.cpu_only}")
    if backend == "native":
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError(f"the native backend has no kernels for {device.type} tensors")
        missing = _state.cpu_missing if device.type == "cpu" else cuda_module_missing()
        if missing is not None:
            raise RuntimeError(f"the native backend is not here: {missing}")
        return op.overload
    missing = triton_missing()
    if missing is not None:
        raise RuntimeError(f"the triton backend is not here: {missing}")
    if device.type != "cuda" and not (device.type == "cpu" and triton_interprets()):
        raise RuntimeError(
            f"the triton backend serves CUDA tensors, got {device.type}: use the native or the reference backend there"
        )
    return triton_implementation(op.name)


# --- Triton ---------------------------------------------------------------------------------------------------------


def triton_missing() -> str | None:
    """Why Triton kernels cannot be used (one sentence), or None when they can."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:  # without an origin: some folder that happens to have the name
        return "Triton is not installed; CUDA builds of PyTorch bring it, elsewhere `pip install triton`"
    return None


def triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_implementation(name: str) -> Callable[..., Any]:
    """The Triton launcher of a raw op: ``_affine_coupling_forward`` is ``nfkernels.triton.affine_coupling.forward``."""
    module, function = name.lstrip("_").rsplit("_", 1)
    return getattr(importlib.import_module(f"nfkernels.triton.{module}"), function)


# --- the CUDA key ---------------------------------------------------------------------------------------------------


def _install_stub(op: Op, key: str = "CUDA") -> torch.library.Library:
    """A Python stub on ``key`` that chooses the op's implementation at its first call and is gone afterwards."""
    stub = torch.library.Library("nfkernels", "IMPL")

    def first_call(*args: Any) -> Any:
        settle_cuda(key)
        return op.overload(*args)

    stub.impl(op.name, first_call, key)
    return stub


def _is_on_cuda(x: torch.Tensor) -> bool:
    return x.is_cuda and not isinstance(x, torch._subclasses.FakeTensor)


def settle_cuda(key: str = "CUDA") -> None:
    """Replaces the stubs on the CUDA key by the best that this machine can run."""
    with _SETTLING:
        stubs = [op for op in _state.ops.values() if op.cuda_stub is not None]
        if not stubs:
            return
        backend, _state.cuda_reason = _cuda_choice()
        for op in stubs:
            op.cuda_stub._destroy()
            if backend == "triton":
                _LIBRARY.impl(op.name, triton_implementation(op.name), key)
        if backend == "native":
            importlib.import_module("nfkernels._C_cuda").register()
        for op in stubs:  # only now: whoever sees no stub finds the kernel
            op.cuda_serves = backend
            op.cuda_stub = None


def _cuda_choice() -> tuple[str, str]:
    """The backend for CUDA tensors, and why that one."""
    no_native = cuda_module_missing()
    if no_native is None:
        return "native", f"CUDA kernels for {importlib.import_module('nfkernels._C_cuda').architectures}"
    no_triton = triton_missing()
    return ("triton", no_native) if no_triton is None else ("reference", f"{no_native}; {no_triton}")


@functools.lru_cache(maxsize=1)
def cuda_module_missing() -> str | None:
    """Why ``nfkernels._C_cuda`` cannot serve CUDA tensors here (one sentence), or None when it can."""
    if torch.version.hip is not None:
        return "this PyTorch is built for AMD GPUs, which run the Triton kernels"
    module, missing = _module("nfkernels._C_cuda")
    if module is None:
        return missing
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    for device in range(torch.cuda.device_count()):
        why = module.why_unusable(device)
        if why is not None:
            return f"cuda:{device}: {why}"
    return None


def cuda_module_state() -> str:
    """One phrase on ``nfkernels._C_cuda`` for :command:`nfkernels info`, on machines without a GPU too."""
    module, missing = _module("nfkernels._C_cuda")
    return missing if module is None else f"built for {module.architectures} by {module.compiler}"


# --- the compiled modules -------------------------------------------------------------------------------------------


def _module(name: str) -> tuple[Any, str | None]:
    """A compiled module, or None and why it does not serve."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        absent = importlib.util.find_spec(name) is None
        return None, f"the compiled module {name} was not built" if absent else f"{name} does not load: {error}"
    if module.schema_version != SCHEMA_VERSION:
        return None, f"{name} was built for op schemas {module.schema_version}, this package has {SCHEMA_VERSION}"
    return module, None


def load_cpu_module() -> None:
    """Imports ``nfkernels._C``, checks that it was built for these schemas, and lets it register its kernels."""
    module, _state.cpu_missing = _module("nfkernels._C")
    if module is not None:
        module.register()
    if _state.cpu_missing is not None:
        root = Path(__file__).parents[2]
        if (root / "csrc").is_dir():
            cure = (
                f"This package is the source tree {root}: build it there with `pip install --no-build-isolation -e .`"
            )
        else:
            cure = "Install it again where a C++17 compiler is present"
        warnings.warn(
            f"{_state.cpu_missing}; CPU tensors use the plain PyTorch reference, which is several times slower. {cure} "
            "(NFKERNELS_CPU=1 makes a build that fails an error, -v shows it).",
            RuntimeWarning,
            stacklevel=2,
        )


# --- what serves what -----------------------------------------------------------------------------------------------


def serving(name: str, device_type: str) -> tuple[str, str]:
    """``(backend, why)`` for a raw op on a kind of device, without calling it."""
    op = _state.ops[name]
    if device_type == "cpu":
        if _state.cpu_missing is None:
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"nfkernels::{name}", "CPU"):
                return "reference", "nfkernels._C is older than this op: build it again"
            return "native", f"C++ kernels, {importlib.import_module('nfkernels._C').isa()}"
        return "reference", _state.cpu_missing
    if op.cpu_only is not None:
        return "reference", op.cpu_only
    if device_type == "cuda":
        if op.cuda_stub is None:
            return op.cuda_serves, _state.cuda_reason
        return _cuda_choice()
    return "reference", f"no kernels for {device_type}"


def op_names() -> list[str]:
    return list(_state.ops)


# --- transforms -----------------------------------------------------------------------------------------------------


def under_transform() -> bool:
    """Whether a ``torch.func`` transform or forward-mode AD is active: both need the composite reference.

    Functions with a combined forward fail under the first, and a raw op silently drops the second's tangents. Under
    ``torch.compile`` neither is looked for: Dynamo traces the Function itself.
    """
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
