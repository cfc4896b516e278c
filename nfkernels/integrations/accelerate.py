"""``accelerate(model)``: flows written for other libraries, faster without a change. Start reading here."""

from __future__ import annotations

import fnmatch
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from . import swap as swapping
from .adapter import Adapter
from .libraries import PLAIN, entry_of, library_of
from .proof import prove
from .registry import find, qualified
from .report import Report, Row, Status, part, row
from .steps import Steps, container, network, put_back
from .steps import channels_last as lay_channels_last
from .watch import unchanged, watch


def accelerate(
    model: nn.Module,
    example_inputs: Any = None,
    verify: bool = True,
    include: Any = None,
    exclude: Any = None,
    dry_run: bool = False,
    *,
    call: str | Callable | None = None,
    fuse: str | None = None,
    memory: str = "stored",
    channels_last: bool = False,
) -> Report:
    """Makes the flow layers of ``model`` faster, in place, and changes nothing else.

    Each layer that an adapter knows (nflows, normflows, FrEIA, zuko; Glow ports and others by their structure) gets a
    subclass of its own class whose methods call nfkernels' ops. Parameters, buffers, ``state_dict`` keys, hooks,
    ``isinstance``, sharing, deep copies, signatures and return values stay. :func:`restore` undoes it.

    Args:
        model: any module; layers are looked for in it and below it.
        example_inputs: a tensor or a tuple: what the model is run on once, the data first, then the context. With
            them every layer is proved now, and layers that are never called are listed as inactive and left alone.
            Without them each layer is proved at its own first call.
        verify: run original and fused layer side by side, both directions, values, log-determinants and gradients, in
            float64 with disturbed parameters and in the layer's own type, and swap only those that agree. False trusts
            the adapters of the libraries; layers known by structure alone are then left as they are.
        include, exclude: which layers: a glob on their path in the model (``"flow.layers.*"``) or on their class's
            name (``"ActNorm"``), a class, a function of ``(path, module)``, or a sequence of these.
        dry_run: report what would be done, and do nothing.
        call: how the model is run on the example inputs: the name of a method, or a function of
            ``(model, *example_inputs)``. By default ``log_prob`` for the libraries' flows, else the model itself.
        fuse: ``"steps"`` also runs actnorm, 1x1 convolution and coupling as one step where a container's structure is
            understood (normflows' ``MultiscaleFlow``, ``NormalizingFlow`` and ``GlowBlock``, Glow ports whose step has
            ``actnorm``, ``invconv`` and ``coupling``): the matrices of all steps are composed at once, and a coupling
            and the mix that follows are one pass. None: layers only.
        memory: ``"reversible"``: those containers (``fuse="steps"`` goes without saying) keep their output alone, and
            the backward rebuilds each step's input, running every network once more. ``"stored"``: as usual.
        channels_last: lay the weights of the conditioners' 2-D convolutions out channels-last, which a CPU likes;
            no value changes, and ``restore`` puts the layout back. In networks that are a plain sequence of
            convolutions and ReLUs (normflows' ``ConvNet2d``, ``nn.Sequential``) these run in one pass.

    Returns:
        A :class:`Report`; print it.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a pattern that matches nothing, or example inputs that the model cannot be run on (the error of the
            model is its cause). Nothing has been changed then.

    Cost: with ``verify``, one run of the model on the example inputs, then per layer about a dozen small runs on at
    most 32 rows, each on a copy; peak memory grows by the parameters and buffers, which are restored after the run.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate expects a torch.nn.Module, got {type(model).__name__}")
    steps = _steps_wanted(fuse, memory, channels_last)
    inputs = None if example_inputs is None else _as_tuple(example_inputs)
    rows: list[Row] = []
    found: dict[nn.Module, Adapter] = {}
    wanted = _selection(model, include, exclude)
    parts: dict[nn.Module, Row] = {}
    for path, module in model.named_modules():
        if module in parts:
            rows.append(part(path, module, parts[module]))
            continue
        adapter, reason = (None, None) if swapping.is_swapped(module) else find(module)
        if steps and not swapping.is_swapped(module):
            fused_steps, why = container(module, memory == "reversible")
            if fused_steps is not None:
                adapter, reason = fused_steps, why
        if swapping.is_swapped(module):
            status: Status = "pending" if swapping.is_pending(module) else "fused"
            rows.append(row(path, module, status, "already"))
            done = find(module)[0] if status == "pending" else type(module).__nfkernels_adapter__
            parts |= dict.fromkeys(done.parts(module) if done else (), rows[-1])
        elif adapter is None:
            if library_of(module) is not None and wanted(path, module):
                name = qualified(type(module))
                rows.append(row(path, module, "kept", PLAIN.get(name, f"no adapter for {name}")))
        elif not wanted(path, module):
            rows.append(row(path, module, "kept", "not asked for (include, exclude)"))
        else:
            reason = reason or adapter.refuse(module) or swapping.hooked(module, adapter)
            if reason is None and exclude is not None and isinstance(adapter, Steps):
                reason = _excluded(model, adapter.parts(module), exclude)
            if reason is None and adapter.structural and not verify:
                reason = "known by its structure alone, which verify=True would have to prove"
            if reason is not None:
                rows.append(row(path, module, "kept", reason))
            else:
                found[module] = adapter
                rows.append(row(path, module, "pending", adapter.waits(module)))
                rows[-1]._kind = adapter.kind
                parts |= dict.fromkeys(adapter.parts(module), rows[-1])
    report = Report(type(model).__name__, rows, dry_run)
    already = any(r._reason == "already" for r in rows)
    if already and (steps or channels_last):
        report.notes.append("what was fused before keeps its options: restore(model) first to choose others")
    elif steps and not any(isinstance(a, Steps) for a in found.values()):
        report.notes.append(
            f"{type(model).__name__} has no container whose steps are understood: fuse and memory change nothing"
        )
    if channels_last:
        _take_networks(model, found, report)
    places = {row._module(): row for row in rows if row._module is not None}

    if not verify:
        for module in found:
            places[module]._status = "fused"
    elif inputs is not None:
        _prove_all(model, found, places, lambda m: _run(m, inputs, call))
        containers = [places[m] for m, a in found.items() if isinstance(a, Steps)]
        if containers and not any(place._status == "fused" for place in containers):
            # Then their layers, which were theirs to replace, are taken one by one.
            less = accelerate(
                model, example_inputs, verify, include, exclude, dry_run, call=call, channels_last=channels_last
            )
            less.notes += [f"no steps in {place.path or 'the model'}: {place.reason}" for place in containers]
            return less
        failed = {place.path: f"no steps: {place.reason}" for place in containers if place._status == "kept"}
        if failed:  # the layers of these are taken one by one, beside the steps of the others
            left = [*(_patterns(exclude, "exclude") or ()), lambda path, _: path in failed]
            less = accelerate(
                model, example_inputs, verify, include, left, dry_run, call=call, fuse=fuse, memory=memory,
                channels_last=channels_last,
            )  # fmt: skip
            for place in less.rows:
                place._reason = failed.get(place.path, place._reason)
            return less
    if dry_run:
        for r in rows:
            r._module = None  # a dry run's rows are final
        return report
    for module, adapter in found.items():
        if places[module]._status == "fused":
            swapping.swap(module, adapter)
        elif places[module]._status == "pending":
            swapping.swap_at_first_call(module, adapter, _lay_out if channels_last else None)
    if verify and inputs is not None and report.fused:
        _whole_model(model, found, places, report, lambda m: _run(m, inputs, call))
    if channels_last:
        _lay_all_out(model, found, places, report, None if inputs is None else lambda m: _run(m, inputs, call))
    return report


def restore(model: nn.Module) -> int:
    """Undoes :func:`accelerate`: every layer of ``model`` gets its own class back. Returns how many there were."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore expects a torch.nn.Module, got {type(model).__name__}")
    put_back(model)
    return swapping.restore(model)


def _take_networks(model: nn.Module, found: dict[nn.Module, Adapter], report: Report) -> None:
    """Those conditioners of what is to be swapped whose ReLUs can join their convolutions."""
    paths = {m: path for path, m in model.named_modules()}
    for inner in dict.fromkeys(n for m, a in found.items() for n in a.conditioners(m)):
        adapter = network(inner)
        if adapter is None or inner in found or inner not in paths or swapping.is_swapped(inner):
            continue
        if adapter.refuse(inner) is None and swapping.hooked(inner, adapter) is None:
            found[inner] = adapter
            report.rows.append(row(paths[inner], inner, "pending"))
            report.rows[-1]._kind = adapter.kind


def _lay_out(module: nn.Module, adapter: Adapter) -> int:
    """Only what is fused: what its own code makes of a network's output may depend on how that lies in memory."""
    return lay_channels_last(adapter.conditioners(module))


def _lay_all_out(model: nn.Module, found: dict, places: dict, report: Report, run: Callable | None) -> None:
    laid = sum(_lay_out(m, a) for m, a in found.items() if places[m]._status == "fused")
    if not laid and not report.pending and not report.notes:
        report.notes.append("channels_last: no convolution in a fused layer's conditioner to lay out otherwise")
    if laid and run is not None:
        layers = {module: type(module) for module in found}  # a first batch, which does not count here, changes some
        try:
            with unchanged(model), torch.no_grad():
                run(model)
        except Exception as error:
            put_back(model)
            report.notes.append(f"channels_last: not laid out, because the model then fails ({error})")
        finally:
            for module, cls in layers.items():
                module.__class__ = cls


def _steps_wanted(fuse: str | None, memory: str, channels_last: bool) -> bool:
    if fuse not in (None, "steps"):
        raise ValueError(f'fuse must be "steps", or None for layers only, got {fuse!r}')
    if memory not in ("stored", "reversible"):
        raise ValueError(f'memory must be "stored" or "reversible", got {memory!r}')
    if not isinstance(channels_last, bool):
        raise ValueError(f"channels_last must be True or False, got {channels_last!r}")
    return fuse == "steps" or memory == "reversible"


def _prove_all(model: nn.Module, found: dict, places: dict[nn.Module, Row], run: Callable) -> None:
    with unchanged(model):
        with torch.no_grad():
            calls = watch(model, found, lambda: run(model))
        for module, adapter in found.items():
            place = places[module]
            if module not in calls:
                place._status, place._reason = "inactive", "never called on the example inputs"
                continue
            small = adapter.too_small(module, calls[module])
            if small is not None:
                place._status, place._reason = "kept", small
                continue
            verdict = prove(module, adapter, calls[module])
            place._status, place._reason = ("fused" if verdict.agrees else "kept"), verdict.text
            found[module] = verdict.adapter


def _whole_model(model: nn.Module, found: dict, places: dict, report: Report, run: Callable) -> None:
    """The last look: the model as a whole, before and after, on the same random numbers."""
    layers = {module: type(module) for module in found}  # a first batch, which does not count here, changes some
    try:
        with unchanged(model), torch.no_grad():
            state = torch.get_rng_state()
            after = _tensors(run(model))
    except Exception:
        for module in layers:
            module.__class__ = swapping.original_of(type(module))
        raise
    for module in layers:
        module.__class__ = swapping.original_of(type(module))
    with unchanged(model), torch.no_grad():
        torch.set_rng_state(state)
        before = _tensors(run(model))
    worst = 0.0
    for b, a in zip(before, after):
        b, a = b.double(), a.double()
        same = (a == b) | b.isnan()  # what the original cannot compute says nothing
        if a.shape == b.shape and a.numel():
            error = torch.where(same, 0.0, (a - b).abs()) / (1 + b.abs().nan_to_num(0.0, 0.0, 0.0).max())
            worst = max(worst, float(error.max().nan_to_num(float("inf"))))
        elif a.shape != b.shape:
            worst = float("inf")
    allowed = 1e-8 if before and all(t.dtype == torch.float64 for t in before) else 1e-3
    if not worst <= allowed:
        for module in layers:
            if places[module]._status == "fused":
                places[module]._status = "kept"
                places[module]._reason = "agrees by itself, but the whole model did not (see below)"
        report.notes.append(
            f"the whole model's output moved by {worst:.1e} of its size (allowed {allowed:.0e}), so nothing was swapped"
        )
        return
    for module, cls in layers.items():
        module.__class__ = cls


def _tensors(out: Any) -> list[Tensor]:
    return [t for t in tree_flatten(out)[0] if isinstance(t, Tensor) and t.is_floating_point()]


def _run(model: nn.Module, inputs: tuple, call: str | Callable | None) -> Any:
    try:
        if call is None:
            return entry_of(model)(model, *inputs)
        return getattr(model, call)(*inputs) if isinstance(call, str) else call(model, *inputs)
    except Exception as error:
        what = ", ".join(map(_described, inputs))
        raise ValueError(
            f"{type(model).__name__} could not be run on the example inputs ({what}): give those that its log_prob or "
            f"forward takes, or say how to run it with call="
        ) from error


def _described(value: Any) -> str:
    """An example input in a few words: shapes of tensors, not their numbers."""
    if isinstance(value, Tensor):
        return f"{type(value).__name__} {tuple(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} of {', '.join(map(_described, value)) or 'nothing'}"
    if isinstance(value, dict):
        return f"{type(value).__name__} of {', '.join(f'{k}: {_described(v)}' for k, v in value.items()) or 'nothing'}"
    return textwrap.shorten(repr(value), 80, placeholder=" ...")


def _as_tuple(inputs: Any) -> tuple:
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def _selection(model: nn.Module, include: Any, exclude: Any) -> Callable[[str, nn.Module], bool]:
    keep, drop = _patterns(include, "include"), _patterns(exclude, "exclude")
    modules = list(model.named_modules())
    for option, patterns in (("include", keep), ("exclude", drop)):
        for pattern in patterns or ():
            if not any(_matches(pattern, path, module) for path, module in modules):
                raise ValueError(
                    f"{option}={pattern!r} matches no module of {type(model).__name__}: expected a path such as "
                    f"{next((p for p, _ in modules if p), 'layers.0')!r}, a glob, or a class"
                )
    return lambda path, module: (
        (keep is None or any(_matches(p, path, module) for p in keep))
        and not any(_matches(p, path, module) for p in drop or ())
    )


def _excluded(model: nn.Module, parts: list[nn.Module], exclude: Any) -> str | None:
    """A container replaces the call of all its parts: one that is to be left as it is keeps the container."""
    patterns, inside = _patterns(exclude, "exclude"), set(parts)
    for path, module in model.named_modules():
        if module in inside and any(_matches(p, path, module) for p in patterns):
            return f"no steps: {path} is excluded"
    return None


def _patterns(value: Any, option: str) -> Sequence | None:
    if value is None:
        return None
    patterns = list(value) if isinstance(value, (list, tuple, set)) else [value]
    for p in patterns:
        if not (isinstance(p, (str, type)) or callable(p)):
            raise TypeError(f"{option} expects globs, classes or functions of (path, module), got {p!r}")
    return patterns


def _matches(pattern: Any, path: str, module: nn.Module) -> bool:
    if isinstance(pattern, str):
        name = type(module).__name__
        return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(name, pattern)
    if isinstance(pattern, type):
        return isinstance(module, pattern)
    return bool(pattern(path, module))
