"""From words to options: the parser of all commands, its ``--help``, and what it says of words it does not know."""

from __future__ import annotations

import argparse
import os
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

from .._nearest import did_you_mean
from .._version import __version__
from .commands import COMMANDS, EXAMPLES, Example
from .completion import answer
from .errors import tells


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command line; a wrong one ends the process with status 2 and one line."""
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may come next
        answer(parser)
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}{_meant(parser, options.parser, unknown)}")
    if options.command is None:
        parser.error("the following arguments are required: COMMAND")
    return options


def build_parser() -> Parser:
    """The whole command line, for those who want to read it rather than run it."""
    parser = Parser(
        "nfkernels",
        "Train normalizing flows on images and tables, draw from them, measure them.",
        "`nfkernels COMMAND --help` has the options and examples of each command.",
        EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.set_defaults(parser=parser)
    # Not required of argparse, which would ask for a command before it told of an unknown option.
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, command in COMMANDS.items():
        # add_parser makes an ArgumentParser of its own choice: these are ours, with the help that belongs to them.
        sub = commands.add_parser(name, help=command.summary, summary=command.summary, notes=command.notes,
                                  examples=command.examples)  # fmt: skip
        command.options(sub)
        # argparse's own usage has every option again, thirty lines of them before the first word.
        wanted = [str(action.metavar) for action in sub._actions if not action.option_strings]
        sub.usage = " ".join([sub.prog, *wanted, "[options]"])
        sub.set_defaults(parser=sub)
        parser.commands[name] = sub
    return parser


class Parser(argparse.ArgumentParser):
    """One line for a mistake, rather than the whole usage and a line, with the nearest of what there is."""

    def __init__(self, prog: str, summary: str, notes: str, examples: Sequence[Example], **rest: Any) -> None:
        width = max(40, min(shutil.get_terminal_size().columns - 2, 118))
        filled = ["\n".join(textwrap.wrap(text, width)) for text in (summary, notes)]
        shown = [line for what, line in examples for line in (*textwrap.wrap(f"# {what}", width - 2), line)]
        super().__init__(
            prog,
            description=filled[0],
            epilog="\n\n".join(filter(None, [filled[1], "examples:\n" + textwrap.indent("\n".join(shown), "  ")])),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **rest,
        )
        self.commands: dict[str, Parser] = {}

    def flags(self) -> list[str]:
        return [flag for flag in self._option_string_actions if flag.startswith("--")]

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n" if tells() else None)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """As argparse's own, but that it has no nearest choice before Python 3.14."""
        if action.choices is not None and value not in action.choices:
            near = did_you_mean(value, action.choices, "; ")
            listed = ", ".join(map(str, action.choices))
            raise argparse.ArgumentError(action, f"invalid choice: {value!r} (choose from {listed}){near}")


def _meant(parser: Parser, sub: Parser, unknown: Sequence[str]) -> str:
    """What the first of these words may have been meant for, in brackets."""
    word = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
    elsewhere = [name for name, other in parser.commands.items() if other is not sub and word in other.flags()]
    if elsewhere:
        return f" ({word} is an option of {', '.join(elsewhere)})"
    near = did_you_mean(word, sub.flags())
    return f" ({near})" if near else ""
