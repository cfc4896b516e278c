"""The flow that `nfkernels train` builds for a table, from its description."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import TrainingError, is_out_of_memory

if TYPE_CHECKING:
    from ...nn import Flow, TableFlow

# The class of each kind, its number of layers, which of these fields of a description it takes, and what it is given
# besides.
_NETWORK = ("layers", "hidden", "depth", "dropout")
_SPLINES = (*_NETWORK, "bins", "bound")
_KINDS: dict[str, tuple[str, int, tuple[str, ...], dict[str, Any]]] = {
    "nsf": ("NSF", 5, _SPLINES, {}),
    "nsf-ar": ("NSF", 5, _SPLINES, {"coupling": False}),
    "maf": ("MAF", 5, _NETWORK, {}),
    "realnvp": ("RealNVP", 8, _NETWORK, {}),
}
FIELDS = ("layers", "hidden", "depth", "bins", "bound", "dropout")


def takes(kind: str, field: str) -> bool:
    """Whether a kind of flow has such a field (``FIELDS``)."""
    return field in _KINDS.get(kind, ("", 0, FIELDS))[2]


def describe(
    kind: str, features: int, context: int, asked: dict[str, Any], circular: Sequence[int] = ()
) -> dict[str, Any]:
    """A description, JSON-able, from what was asked for (``FIELDS``). ``TrainingError`` where there can be none."""
    if circular and "bins" not in _KINDS[kind][2]:
        raise TrainingError(f"--circular needs --model nsf or nsf-ar: {kind} knows no angles")
    if isinstance(asked["depth"], tuple):
        raise TrainingError(f"--depth {','.join(map(str, asked['depth']))}: for a table give one number")
    if kind == "realnvp" and features < 2:
        raise TrainingError("--model realnvp needs two columns or more, of which one decides about the other: try nsf")
    taken = {field: value for field, value in asked.items() if field in _KINDS[kind][2]}
    taken["layers"] = _KINDS[kind][1] if taken["layers"] is None else taken["layers"]
    angles = {"circular": list(circular)} if circular else {}
    return {"kind": kind, "features": features, "context": context, **taken, **angles}


def build(description: dict[str, Any], columns: list[dict[str, Any]]) -> TableFlow:
    """The flow over ``columns`` (see ``TableFlow``). ``TrainingError`` with the model's own sentence where it refuses
    its arguments."""
    from ...nn import TableFlow

    try:
        arguments = dict(description)
        kind = arguments.pop("kind")
        maker, more = _maker(kind), _KINDS[kind][3]
        if not arguments.get("dropout"):  # not every model has one
            arguments.pop("dropout", None)
        return TableFlow(maker(arguments.pop("features"), **more, **arguments), columns)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise TrainingError(f"a flow for this table cannot be built: {error}") from error


def title(description: dict[str, Any]) -> str:
    """Kind and size in words."""
    layers = description["layers"]
    name = _KINDS[description["kind"]][0] + (" (autoregressive)" if description["kind"] == "nsf-ar" else "")
    words = f"{name}: {layers} layer{'s' * (layers != 1)}, networks of {description['depth']}"
    words += f" x {description['hidden']}"
    return words + (f", {description['bins']} bins" if "bins" in description else "")


def _maker(kind: str) -> Callable[..., Flow]:
    from ... import models

    return getattr(models, _KINDS[kind][0])
