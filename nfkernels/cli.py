"""The ``nfkernels`` command: train | sample | interpolate | evaluate | demo | info.

Nothing here imports torch before a command runs, so that ``--help`` answers at once. A user's mistake is one sentence
and exit status 1 (2 where the command line itself is wrong); only a defect of this program shows a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .training.config_file import read_config
from .training.demo.options import DEMO, NAMES, demo_name
from .training.option import Option, device, number, several, whole
from .training.option import name as named
from .training.options import TRAIN, as_text, merged
from .training.recipe import PRECISIONS, most_threads
from .training.tables.kind import is_table_run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status. ``argv`` is by default the process's."""
    shown = warnings.showwarning
    try:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # names of files and classes may hold what this terminal cannot show
                stream.reconfigure(errors="backslashreplace")
        options, unknown = _parser().parse_known_args(argv)
        if unknown:
            options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        warnings.showwarning = _show_warning
        return options.run_command(options)
    except KeyboardInterrupt:
        if _is_main():
            print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `nfkernels info | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if not _tells(error):
            return 1
        sentence = _sentence(error, options.command)
        if sentence is None:
            raise
        with contextlib.suppress(BrokenPipeError):
            print(f"nfkernels {options.command}: {sentence}", file=sys.stderr)
        return 1
    finally:
        warnings.showwarning = shown


_LONGEST = 600  # characters of a sentence
_LESS = {
    "train": "try --memory reversible, --accumulate, a smaller --batch-size, --width or --size, or fewer images",
    "sample": "try a smaller --count",
    "interpolate": "try fewer --pairs or --steps",
    "evaluate": "try fewer images (--data)",
    "demo": "try a smaller --batch-size, --width or --layers",
}


def _sentence(error: Exception, command: str) -> str | None:
    """What to tell a user about an error that is no defect; None for one that is."""
    import torch

    from .nn import CheckpointError
    from .training import DataError, TrainingError
    from .training.errors import is_out_of_memory

    if isinstance(error, (DataError, TrainingError, CheckpointError)):
        return _one_line(str(error))
    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU has not enough memory: {_LESS.get(command, 'free some')}"
    if is_out_of_memory(error):
        return f"there is not enough memory: {_LESS.get(command, 'free some')}"
    if isinstance(error, OSError) and (error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return None


def _is_main() -> bool:
    """Whether this is the only process of a command, or the one of torchrun's that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def _tells(error: Exception | None = None) -> bool:
    """Whether this process tells of a mistake: of several the first that meets it, so that it is told once."""
    if "RANK" not in os.environ:
        return True
    from .training.distributed import FailedElsewhereError, speaks_first

    return not isinstance(error, FailedElsewhereError) and speaks_first()


def _one_line(text: str) -> str:
    """Some errors that a sentence quotes, such as torch's of a state that does not fit, go on for pages."""
    line = " ".join(part.strip() for part in text.splitlines() if part.strip())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."


def _show_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    if not _is_main():
        return
    with contextlib.suppress(BrokenPipeError):
        print(f"warning: {message}", file=sys.stderr)


# --- info -----------------------------------------------------------------------------------------------------------


def _info(options: argparse.Namespace) -> int:
    facts = _facts()
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    for name, version in facts["versions"].items():
        print(f"{name:<13} {version or 'not installed'}")
    print(f"{'cpu':<13} {facts['cpu']}")
    for name, description in facts["devices"].items():
        print(f"{name:<13} {description}")
    rows = [("op", "device", "kernel", "why"), *(tuple(row.values()) for row in facts["ops"])]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    print()
    for *cells, why in rows:
        print("  ".join([cell.ljust(width) for cell, width in zip(cells, widths, strict=True)] + [why]))
    return 0


def _facts() -> dict[str, Any]:
    import platform
    from importlib import metadata

    import torch

    from . import __version__
    from .ops import _library
    from .training.session import devices_here, why_no_cuda

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    needed, optional = (
        ("safetensors", "numpy"),
        ("scikit-learn", "matplotlib", "pillow", "tqdm", "pyyaml", "tensorboard"),
    )
    packages = ("triton", *needed, *optional)
    versions = {"nfkernels": __version__, "python": platform.python_version(), "torch": torch.__version__}
    versions |= {package: version(package) for package in packages}
    here = devices_here()
    devices = {}
    for name in here:
        if name.startswith("cuda"):
            card = torch.cuda.get_device_properties(name)
            memory = f"{card.total_memory / 2**30:.0f} GiB"
            devices[name] = f"{card.name}, {memory}, compute capability {card.major}.{card.minor}"
        elif name == "mps":
            devices[name] = "Apple GPU"
    if "cuda:0" not in here:
        devices["cuda"] = f"not here: {why_no_cuda()}"
    devices["cuda kernels"] = _library.cuda_module_state()
    ops = []
    for op in _library.op_names():
        for kind in dict.fromkeys(name.partition(":")[0] for name in here):
            kernel, why = _library.serving(op, kind)
            ops.append({"op": op.lstrip("_"), "device": kind, "kernel": kernel, "why": why})
    threads = torch.get_num_threads()
    cpu = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' * (threads != 1)}"
    return {"versions": versions, "cpu": cpu, "devices": devices, "ops": ops}


# --- the command line -----------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        """One line rather than the whole usage and a line."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n" if _tells() else None)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="nfkernels",
        description="Train normalizing flows on images and tables, draw from them, measure them.",
        epilog="`nfkernels train` alone trains a Glow on the digits that come with scikit-learn; "
        "`nfkernels train --data table.csv` a spline flow on the columns of a table; `nfkernels demo moons` "
        "draws a flow of the plane.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], summary: str) -> Any:
        sub = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        sub.set_defaults(run_command=run, parser=sub)
        return sub

    sub = command(
        "train", _train, "Train a flow on images or a table; writes a run folder with model, metrics and pictures."
    )
    sub.epilog = (
        "The defaults suit the digits: few images, so much weight decay and dropout. For tens of thousands of images "
        "try --steps 20000 --lr 0.001 --weight-decay 0 --dropout 0, or a --preset. Tables have defaults of their own."
    )
    _train_options(sub)

    sub = command("sample", _of_run("sample"), "Draw from a trained flow: images into one PNG, rows into a table.")
    _run_argument(sub)
    sub.add_argument(
        "--count",
        type=_typed(whole(1)),
        metavar="N",
        help="images (default 64; of --temperatures, 8 for each), or rows of a table (default 1000; 1 for each row "
        "of a file that --context names)",
    )
    heat = sub.add_mutually_exclusive_group()
    heat.add_argument(
        "--temperature",
        type=_typed(_TEMPERATURE),
        default=1.0,
        metavar="T",
        help="scales the latent's standard deviation; below 1 gives cleaner, less varied images (default 1)",
    )
    heat.add_argument(
        "--temperatures",
        type=_typed(several(_TEMPERATURE)),
        metavar="T,T...",
        help="a row of images for each, all from the same noise, such as 0.5,0.7,0.9,1.0",
    )
    sub.add_argument(
        "--class",
        dest="label",
        type=_typed(named),
        metavar="K",
        help="name or number of a class (default: all in turn)",
    )
    sub.add_argument(
        "--context",
        type=_typed(named),
        metavar="A=X,...|FILE",
        help="of a table's flow that was trained with --context: the values of these columns, or a table of them",
    )
    _picture_options(sub, "samples.png", "; of a table .csv, .npy or .parquet: samples.csv")
    sub.add_argument("--seed", type=_typed(whole(0)), default=0, metavar="N", help="of the draws (default 0)")
    _machine_options(sub)

    sub = command(
        "interpolate", _of_run("interpolate"), "Images between two images, through the latents, into one PNG."
    )
    _run_argument(sub)
    _data_option(sub)
    sub.add_argument("--pairs", type=_typed(whole(1)), default=4, metavar="N", help="rows (default 4)")
    sub.add_argument(
        "--steps",
        type=_typed(whole(2)),
        default=9,
        metavar="M",
        help="images of a row; the first and the last are the two, through the flow and back (default 9)",
    )
    _picture_options(sub, "interpolation.png")
    sub.add_argument(
        "--seed", type=_typed(whole(0)), default=0, metavar="N", help="of the choice of images (default 0)"
    )
    _machine_options(sub)

    sub = command(
        "evaluate",
        _of_run("evaluate"),
        "Bits per dimension or nats per row with standard error; errors of a round trip.",
    )
    _run_argument(sub)
    _data_option(sub)
    sub.add_argument(
        "--draws", type=_typed(whole(1)), default=20, metavar="N", help="dequantisation draws (default 20)"
    )
    sub.add_argument(
        "--importance-samples",
        type=_typed(whole(1)),
        metavar="K",
        help="also the tighter bound from the mean density of K draws per image",
    )
    sub.add_argument("--seed", type=_typed(whole(0)), default=0, metavar="N", help="of the draws (default 0)")
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub.add_argument(
        "--out",
        type=_typed(named),
        metavar="FILE",
        help="of a table: also write the log-density of each row, in nats, to this .csv, .npy or .parquet",
    )
    sub.add_argument(
        "--missing",
        choices=("refuse", "drop"),
        default="refuse",
        help="rows of --data that lack a value: an error, or left out (default refuse)",
    )
    _machine_options(sub)

    sub = command("demo", _later("demo", "demo.run"), "A first look: pictures of a flow of the plane, in seconds.")
    sub.epilog = (
        "moons, rings, checkerboard and pinwheel train a flow on points of the plane and draw its density, its warped "
        "grid, its samples, and what each layer does; change-of-variables trains nothing and draws what exp, an affine "
        "map and ln make of a normal."
    )
    sub.add_argument("name", type=_typed(demo_name), metavar="NAME", help=f"{', '.join(NAMES)}")
    _table_options(sub, DEMO, None)

    sub = command("info", _info, "Versions, devices, and which kernel serves each op and why.")
    sub.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _later(command: str, module: str = "finished") -> Callable[[argparse.Namespace], int]:
    """A command of ``training/<module>.py``, imported (with torch) when it is run."""
    return lambda options: getattr(importlib.import_module(f"{__package__}.training.{module}"), command)(options)


def _of_run(command: str) -> Callable[[argparse.Namespace], int]:
    """A command on a trained flow, as its kind of data asks for."""

    def run(options: argparse.Namespace) -> int:
        module = "tables.commands" if is_table_run(options.run) else "finished"
        return _later(command, module)(options)

    return run


def _train(options: argparse.Namespace) -> int:
    """Brings together what command line, file and preset ask for; then trains, or prints it."""
    given = {option: value for option, value in vars(options).items() if option in TRAIN}
    asked = merged(given, {} if options.config is None else read_config(options.config, TRAIN))
    if options.print_config is not None:
        if _is_main():
            print(as_text(asked, options.print_config))
        return 0
    return _later("train", "commands")(argparse.Namespace(**{option: asked.get(option) for option in TRAIN}))


_TEMPERATURE = number(0, 1000)


def _run_argument(sub: Any) -> None:
    sub.add_argument("run", type=_typed(named), metavar="RUN", help="folder of a run, or a model.safetensors file")


def _data_option(sub: Any) -> None:
    sub.add_argument(
        "--data",
        type=_typed(named),
        metavar="digits|PATH",
        help="other images, brought to the flow's size, or another table (default: the run's test part)",
    )


def _picture_options(sub: Any, file: str, more: str = "") -> None:
    sub.add_argument(
        "--out", type=_typed(named), metavar="FILE", help=f"PNG to write (default: {file} in the run folder{more})"
    )
    sub.add_argument("--npz", type=_typed(named), metavar="FILE", help="also write the images as uint8 [N, H, W, C]")


def _train_options(sub: Any) -> None:
    """Without defaults: what nobody gives may still come from a file or a preset."""
    groups = _table_options(sub, TRAIN, argparse.SUPPRESS)
    groups["training"].add_argument(
        "-q", "--quiet", dest="progress", action="store_const", const="none", default=argparse.SUPPRESS,
        help="as --progress none",
    )  # fmt: skip
    where = sub.add_argument_group("files of options")
    where.add_argument(
        "--config",
        type=_typed(named),
        metavar="FILE",
        help="YAML or JSON of options; the command line has the last word",
    )
    where.add_argument(
        "--print-config",
        nargs="?",
        const="yaml",
        choices=("yaml", "json"),
        help="print all options with their values, as such a file, and train nothing",
    )


def _table_options(sub: Any, table: Mapping[str, Option], default: Any) -> dict[str, Any]:
    """Adds every option of a table, ``default`` where nobody gives it; the groups of ``--help`` by their headings."""
    groups: dict[str, Any] = {}
    for option in table.values():
        group = groups.get(option.group) or groups.setdefault(option.group, sub.add_argument_group(option.group))
        how: dict[str, Any] = {"help": option.help.replace("%", "%%"), "default": default}
        if option.is_switch:
            how["action"] = argparse.BooleanOptionalAction
        elif option.choices is not None:
            how |= {"choices": option.choices, "type": type(option.choices[0])}
        else:
            how |= {"type": _typed(option.kind), "metavar": option.metavar}
        group.add_argument(option.flag, **how)
    return groups


def _machine_options(sub: Any) -> None:
    where = sub.add_argument_group("machine")
    where.add_argument(
        "--device", type=_typed(device), metavar="NAME", help="cpu, cuda, cuda:1 (default: cuda if here)"
    )
    where.add_argument(
        "--threads",
        type=_typed(whole(1, most_threads())),
        metavar="N",
        help="CPU threads (default: PyTorch's own choice)",
    )
    where.add_argument("--precision", choices=PRECISIONS, help="of the networks (default: as the run was trained)")


def _typed(kind: Callable[[Any], Any]) -> Callable[[str], Any]:
    """A kind of value for argparse, whose messages follow "argument --steps: "."""

    def parse(text: str) -> Any:
        try:
            return kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None

    return parse
