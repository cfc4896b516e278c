"""Options that several commands have, and how a table of options becomes those of one."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..training.option import Option, device, whole
from ..training.option import name as named
from ..training.recipe import PRECISIONS, most_threads


def typed(kind: Callable[[Any], Any]) -> Callable[[str], Any]:
    """A kind of value for argparse, whose messages follow "argument --steps: "."""

    def parse(text: str) -> Any:
        try:
            return kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None

    return parse


def add_table(sub: Any, table: Mapping[str, Option], default: Any) -> dict[str, Any]:
    """Adds every option of a table, ``default`` where nobody gives it; the groups of ``--help`` by their headings."""
    groups: dict[str, Any] = {}
    for option in table.values():
        group = groups.get(option.group) or groups.setdefault(option.group, sub.add_argument_group(option.group))
        how: dict[str, Any] = {"help": option.help.replace("%", "%%"), "default": default}
        if option.choices is not None:
            how |= {"choices": option.choices, "type": type(option.choices[0])}
        elif option.kind is not None:
            how |= {"type": typed(option.kind), "metavar": option.metavar}
        else:
            how["action"] = argparse.BooleanOptionalAction
        group.add_argument(option.flag, **how)
    return groups


def add_quiet(group: Any, default: Any) -> None:
    group.add_argument(
        "-q", "--quiet", dest="progress", action="store_const", const="none", default=default,
        help="as --progress none",
    )  # fmt: skip


def add_json(sub: Any) -> None:
    sub.add_argument("--json", action="store_true", help="print one JSON object instead, for programs")


def add_run(sub: Any) -> None:
    run = sub.add_argument("run", type=typed(named), metavar="RUN", help="folder of a run, or a model.safetensors file")
    run.completer = lambda **_: list(_runs())  # for argcomplete; where none fits, the shell completes files


def add_data(sub: Any) -> None:
    sub.add_argument(
        "--data",
        type=typed(named),
        metavar="digits|PATH",
        help="other images, brought to the flow's size, or another table (default: the run's test part)",
    )


def add_seed(sub: Any, of: str = "of the draws") -> None:
    sub.add_argument("--seed", type=typed(whole(0)), default=0, metavar="N", help=f"{of} (default 0)")


def add_pictures(sub: Any, file: str, more: str = "") -> None:
    sub.add_argument(
        "--out", type=typed(named), metavar="FILE", help=f"PNG to write (default: {file} in the run folder{more})"
    )
    sub.add_argument("--npz", type=typed(named), metavar="FILE", help="also write the images as uint8 [N, H, W, C]")


def add_machine(sub: Any) -> None:
    where = sub.add_argument_group("machine")
    where.add_argument("--device", type=typed(device), metavar="NAME", help="cpu, cuda, cuda:1 (default: cuda if here)")
    where.add_argument(
        "--threads",
        type=typed(whole(1, most_threads())),
        metavar="N",
        help="CPU threads (default: PyTorch's own choice)",
    )
    where.add_argument("--precision", choices=PRECISIONS, help="of the networks (default: as the run was trained)")


def _runs() -> Iterator[str]:
    for file in sorted(Path("runs").glob("*/model.safetensors")):
        yield str(file.parent)
