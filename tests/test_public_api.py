"""The public names: each listed once and importable, documented with shapes and errors, and fully annotated."""

import importlib
import inspect
import re
import subprocess
import sys
from enum import Enum
from pathlib import Path

import pytest

import nfkernels

LAZY = ["nfkernels", "nfkernels.diagnostics", "nfkernels.training"]
MODULES = [
    "nfkernels",
    *(f"nfkernels.{name}" for name in nfkernels.__all__ if inspect.ismodule(getattr(nfkernels, name))),
    "nfkernels.nn.masks",
]
SHAPE = re.compile(r"``[^`]*\[[^\[\]`]+\]|\[[A-Z*][^\[\]]*\]|\bscalar\b|\bshape", re.IGNORECASE)
ERROR = re.compile(r"\braises?\b|\w+Error\b", re.IGNORECASE)


def public():
    """``(where it is listed, the object)`` of every name, each object once."""
    found = {}
    for module in map(importlib.import_module, MODULES):
        for name in names_of(module):
            value = getattr(module, name)
            if inspect.isroutine(value) or inspect.isclass(value):
                found.setdefault(id(value), (f"{module.__name__}.{name}", value))
    return sorted(found.values(), key=lambda pair: pair[0])


def names_of(module):
    if hasattr(module, "__all__"):
        return module.__all__
    return [
        n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__ and n[0] != "_"
    ]


def ours(cls):
    return [base for base in cls.__mro__ if base.__module__.partition(".")[0] == "nfkernels"]


def methods():
    """``(name, class, function)`` of every public method and property that a public class, or what it derives from in
    this package, defines itself."""
    for where, cls in PUBLIC:
        if not inspect.isclass(cls):
            continue
        seen = set()
        for base in ours(cls):
            for name, value in vars(base).items():
                function = getattr(value, "fget", None) or getattr(value, "__func__", value)
                function = inspect.unwrap(function) if callable(function) else function
                # What torch asks a module to print is torch's to document.
                if name[0] != "_" and name != "extra_repr" and inspect.isfunction(function) and name not in seen:
                    seen.add(name)
                    yield f"{where}.{name}", cls, function


PUBLIC = public()
METHODS = list(methods())
FUNCTIONS = [(where, value) for where, value in PUBLIC if not inspect.isclass(value)]
CLASSES = [(where, value) for where, value in PUBLIC if inspect.isclass(value)]


def takes_tensors(function):
    return any("Tensor" in str(p.annotation) for p in inspect.signature(function).parameters.values())


def documentation(cls, name=None):
    """The docstrings of a class and of what it derives from here, or of one of its methods."""
    holders = ours(cls) if name is None else [vars(base).get(name) for base in ours(cls)]
    return "\n".join(inspect.cleandoc(held.__doc__) for held in holders if held is not None and held.__doc__)


def test_there_is_something_to_look_at():
    assert len(FUNCTIONS) > 30
    assert len(CLASSES) > 80
    assert len(METHODS) > 200


@pytest.mark.parametrize("package", MODULES)
def test_every_listed_name_is_there_once(package):
    module = importlib.import_module(package)
    names = names_of(module)
    assert len(set(names)) == len(names) > 0
    for name in names:
        assert getattr(module, name) is not None, name
    assert set(names) <= set(dir(module))


@pytest.mark.parametrize("package", LAZY)
def test_lazy_packages_list_their_names_in_the_stub_alone(package):
    module = importlib.import_module(package)
    stub = Path(module.__file__).with_suffix(".pyi")
    lines = [line for line in stub.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    for line in lines:  # the only form that nfkernels/_lazy.py reads
        assert re.fullmatch(r"from (\.[\w.]*) import (\w+) as \2", line), line
    assert module.__all__ == sorted(line.split()[3] for line in lines)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018


@pytest.mark.parametrize("package", LAZY)
def test_nothing_is_imported_before_it_is_used(package):
    code = f"import sys, {package} as p; dir(p), p.__all__; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize(("where", "function"), FUNCTIONS, ids=[where for where, _ in FUNCTIONS])
def test_functions_are_documented(where, function):
    assert function.__doc__, f"{where} has no docstring"
    if takes_tensors(function):
        assert SHAPE.search(function.__doc__), f"{where} takes tensors: its docstring names no shape"
        assert ERROR.search(function.__doc__), f"{where} takes tensors: its docstring names no error"


@pytest.mark.parametrize(("where", "cls"), CLASSES, ids=[where for where, _ in CLASSES])
def test_classes_are_documented(where, cls):
    assert cls.__doc__, f"{where} has no docstring"
    assert not cls.__doc__.startswith(f"{cls.__name__}("), f"{where} has the docstring that a dataclass makes up"
    text = documentation(cls)
    if any(takes_tensors(function) for _, of, function in METHODS if of is cls):
        assert SHAPE.search(text), f"{where} takes tensors: its docstring names no shape"
        assert ERROR.search(text), f"{where} takes tensors: its docstring names no error"


def test_methods_are_documented():
    """By a docstring of their own or of what they override, or by their name in that of the class."""
    bare = []
    for where, cls, function in METHODS:
        name = where.rpartition(".")[2]
        text = documentation(cls)
        if not documentation(cls, name) and f"``{name}" not in text and f"{name}:" not in text:
            bare.append(where)
        elif takes_tensors(function) and not SHAPE.search(documentation(cls, name) + text):
            bare.append(f"{where}: no shape")
    assert not bare, "\n".join(bare)


def unannotated(function):
    signature = inspect.signature(function)
    without = [
        p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name not in ("self", "cls")
    ]
    return without + (["return"] if signature.return_annotation is signature.empty else [])


def test_everything_public_is_annotated():
    functions = [*FUNCTIONS, *((where, function) for where, _, function in METHODS)]
    for where, cls in CLASSES:
        init = inspect.unwrap(cls.__init__)
        if inspect.isfunction(init) and init.__module__.startswith("nfkernels") and not issubclass(cls, Enum):
            functions.append((f"{where}.__init__", init))
    bare = [f"{where}: {', '.join(missing)}" for where, f in functions if (missing := unannotated(inspect.unwrap(f)))]
    assert not bare, "\n".join(bare)
