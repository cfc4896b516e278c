"""CIFAR-10 and CIFAR-100 python batches, which are pickles, read without loading a pickle.

A pickle is a program: loading one calls whatever it names. Here its opcodes are walked with `pickletools.genops` (which
only splits the file into opcode and argument), and a small stack machine puts strings, numbers, lists and dictionaries
together. The handful of names that numpy writes into such a file are known by sight and stand for inert records;
any other name ends the reading. Nothing named in the file is ever imported or called.
"""

from __future__ import annotations

import dataclasses
import enum
import pickletools
from pathlib import Path
from typing import Any

import torch

from .conform import assemble
from .image_data import DataError, ImageData

_SHAPE = (3, 32, 32)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where one of the two sets keeps what."""

    name: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels: str
    class_names: str


LAYOUTS = (
    Layout(
        "CIFAR-10", tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta", "labels", "label_names"
    ),
    Layout("CIFAR-100", ("train",), "test", "meta", "fine_labels", "fine_label_names"),
)


def find_layout(folder: Path) -> Layout | None:
    """The set whose files a folder holds, told by their names; None for neither."""
    return next((layout for layout in LAYOUTS if any((folder / name).is_file() for name in layout.train)), None)


def load_cifar(folder: Path, layout: Layout, size: tuple[int, int] | None, channels: int | None) -> ImageData:
    """Read the training batches and, where it is there, the test batch: 32 x 32 RGB with labels.

    Raises:
        DataError: a training batch is missing, or a file is not what it should be.
    """
    missing = [name for name in layout.train if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder} lacks {', '.join(missing)} of {layout.name}: unpack the archive again")
    parts = [_read_batch(folder / name, layout) for name in layout.train]
    train = torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])
    test = _read_batch(folder / layout.test, layout) if (folder / layout.test).is_file() else None
    classes = _read_classes(folder / layout.meta, layout) if (folder / layout.meta).is_file() else None
    return assemble(str(folder), folder.resolve().name, train, test, size, channels, classes)


def _read_batch(path: Path, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    content = _read_dict(path, f"{layout.name} batch")
    try:
        shape, raw = _array(content["data"])
        labels = content[layout.labels]
        if not isinstance(labels, list) or any(type(label) is not int or not 0 <= label < 256 for label in labels):
            raise _Unexpected(f"its {layout.labels} are not a list of class numbers")
        values = _SHAPE[0] * _SHAPE[1] * _SHAPE[2]
        if not labels or shape != (len(labels), values) or len(raw) != len(labels) * values:
            raise _Unexpected(f"its data is not one row of {values} bytes for each of its {len(labels)} labels")
        return torch.frombuffer(raw, dtype=torch.uint8).view(-1, *_SHAPE), torch.tensor(labels)
    except KeyError as error:
        raise DataError(f"{path} is not a {layout.name} batch: it has no {error}") from error
    except _Unexpected as error:
        raise DataError(f"{path} is not a {layout.name} batch: {error}") from error


def _read_classes(path: Path, layout: Layout) -> tuple[str, ...]:
    names = _read_dict(path, f"{layout.name} meta file").get(layout.class_names)
    if not isinstance(names, list) or not names or not all(isinstance(name, (str, bytes)) for name in names):
        raise DataError(f"{path} is not a {layout.name} meta file: it has no list of {layout.class_names}")
    return tuple(name if isinstance(name, str) else name.decode("utf-8", "replace") for name in names)


# --- the pickle, as data ---


class _Unexpected(Exception):
    """Something that these files do not contain; becomes a DataError that names the file."""


class _Known(enum.Enum):
    RECONSTRUCT = "numpy.ndarray, to be filled by a state"
    FROMBUFFER = "numpy.ndarray, from bytes (pickle protocol 5)"
    NDARRAY = "the array type"
    DTYPE = "an element type"
    ENCODE = "bytes as text (pickle protocols 0 to 2 have no bytes)"


_NAMES = {
    ("numpy", "ndarray"): _Known.NDARRAY,
    ("numpy", "dtype"): _Known.DTYPE,
    ("_codecs", "encode"): _Known.ENCODE,
    # numpy 2 moved its core; both names are in use.
    ("numpy.core.multiarray", "_reconstruct"): _Known.RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _Known.RECONSTRUCT,
    ("numpy.core.numeric", "_frombuffer"): _Known.FROMBUFFER,
    ("numpy._core.numeric", "_frombuffer"): _Known.FROMBUFFER,
}


@dataclasses.dataclass(eq=False)
class _Call:
    """A call that the file asks for and that is not made."""

    function: _Known
    arguments: tuple[Any, ...]
    state: Any = None


def _read_dict(path: Path, what: str) -> dict[str, Any]:
    """The dictionary that a pickle describes, its keys as text."""
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(path.read_bytes()):
            machine.step(opcode.name, argument)
        content = machine.stack.pop()
        if not isinstance(content, dict):
            raise _Unexpected("it does not hold a dictionary")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    except _Unexpected as error:
        raise DataError(f"{path} is not a {what}: {error}") from error
    except (ValueError, IndexError, KeyError) as error:  # from genops; or the stack or the memo lacks an entry
        raise DataError(f"{path} is not a {what}: it is no complete pickle") from error
    return {key.decode("latin-1") if isinstance(key, bytes) else key: value for key, value in content.items()}


_PUSH = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_PUSH_NEW: dict[str, Any] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """The part of pickle's stack machine that arrays, lists of numbers and dictionaries need."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _PUSH:
            stack.append(argument)
        elif name in _PUSH_NEW:
            stack.append(_PUSH_NEW[name]())
        elif name in _TUPLES:
            stack.append(tuple(self._cut(len(stack) - _TUPLES[name])))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(self._cut(self.marks.pop())))
        elif name == "LIST":
            stack.append(self._cut(self.marks.pop()))
        elif name == "DICT":
            items = self._cut(self.marks.pop())
            stack.append({})
            self._set_items(items)
        elif name == "APPEND":
            self._extend([stack.pop()])
        elif name == "APPENDS":
            self._extend(self._cut(self.marks.pop()))
        elif name == "SETITEM":
            self._set_items(self._cut(len(stack) - 2))
        elif name == "SETITEMS":
            self._set_items(self._cut(self.marks.pop()))
        elif name == "GLOBAL":
            stack.append(self._named(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(self._named(*self._cut(len(stack) - 2)))
        elif name == "REDUCE":
            stack.append(self._call(*self._cut(len(stack) - 2)))
        elif name == "BUILD":
            state = stack.pop()
            if not isinstance(stack[-1], _Call):
                raise _Unexpected("it sets the state of something that is not an array")
            stack[-1].state = state
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise _Unexpected(f"it uses the pickle instruction {name}")

    def _cut(self, start: int) -> list[Any]:
        if not 0 <= start <= len(self.stack):
            raise IndexError("stack underflow")
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise _Unexpected("it appends to something that is not a list")
        self.stack[-1].extend(items)

    def _set_items(self, items: list[Any]) -> None:
        # Plain keys only: hashing nested tuples, cheap to write in a pickle, can take for ever.
        plain = all(isinstance(key, (str, bytes, int)) for key in items[::2])
        if not isinstance(self.stack[-1], dict) or len(items) % 2 or not plain:
            raise _Unexpected("it holds something other than plain dictionaries")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    @staticmethod
    def _named(module: Any, name: Any) -> _Known:
        if not isinstance(module, str) or not isinstance(name, str) or (module, name) not in _NAMES:
            shown = f"{module}.{name}"[:80] if isinstance(module, str) and isinstance(name, str) else "something"
            raise _Unexpected(f"it asks for {shown!r}, which no such file needs")
        return _NAMES[module, name]

    @staticmethod
    def _call(function: Any, arguments: Any) -> _Call | bytes:
        if not isinstance(function, _Known) or not isinstance(arguments, tuple):
            raise _Unexpected("it makes a call that no such file needs")
        if function is not _Known.ENCODE:
            return _Call(function, arguments)
        if len(arguments) != 2 or arguments[1] not in ("latin1", "latin-1") or not isinstance(arguments[0], str):
            raise _Unexpected("it encodes text in another way than bytes are written")
        return arguments[0].encode("latin-1")


def _array(value: Any) -> tuple[tuple[Any, ...], bytearray]:
    """Shape and bytes of what stands for a uint8 array in row-major order."""
    if isinstance(value, _Call) and value.function is _Known.RECONSTRUCT:
        # numpy's __setstate__: version, shape, dtype, whether column-major, bytes
        parts = value.state[1:] if isinstance(value.state, tuple) else ()
    elif isinstance(value, _Call) and value.function is _Known.FROMBUFFER and len(value.arguments) == 4:
        raw, dtype, shape, order = value.arguments
        parts = (shape, dtype, order != "C", raw)
    else:
        parts = ()
    if len(parts) != 4:
        raise _Unexpected("its data is not a numpy array")
    shape, dtype, column_major, raw = parts
    is_dtype = isinstance(dtype, _Call) and dtype.function is _Known.DTYPE
    if not is_dtype or dtype.arguments[:1] not in (("u1",), (b"u1",)):
        raise _Unexpected("its data is not uint8")
    if isinstance(raw, str):  # Python 2 has one type for both, which genops gives as latin-1 text
        raw = raw.encode("latin-1", "replace")
    if column_major or not isinstance(raw, (bytes, bytearray)) or not isinstance(shape, tuple):
        raise _Unexpected("its data is not a row-major array")
    return shape, bytearray(raw)
