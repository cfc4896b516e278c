"""The ``nfkernels`` command: train | sample | evaluate | info.

Nothing here imports torch before a command runs, so that ``--help`` answers at once. A user's mistake is one sentence
and exit status 1 (2 where the command line itself is wrong); only a defect of this program shows a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from .training.recipe import SCHEDULES, GlowShape, Recipe, most_threads

_LARGEST_SIDE = 16384  # pixels that --size takes


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
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `nfkernels info | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
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
    "train": "try a smaller --batch-size, --width, --depth or --size, or fewer images",
    "sample": "try a smaller --count",
    "evaluate": "try fewer images (--data)",
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


def _one_line(text: str) -> str:
    """Some errors that a sentence quotes, such as torch's of a state that does not fit, go on for pages."""
    line = " ".join(part.strip() for part in text.splitlines() if part.strip())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."


def _show_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
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

    packages = ("triton", "safetensors", "numpy", "scikit-learn", "matplotlib", "pillow", "tqdm")
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
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="nfkernels",
        description="Train normalizing flows on images, draw from them, measure them.",
        epilog="`nfkernels train` alone trains a Glow on the digits that come with scikit-learn.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], summary: str) -> Any:
        sub = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        sub.set_defaults(run_command=run, parser=sub)
        return sub

    sub = command("train", _later("train"), "Train a Glow; writes a run folder with model, metrics and pictures.")
    sub.epilog = (
        "The defaults suit the digits: few images, so much weight decay and dropout. For tens of thousands of images "
        "try --steps 20000 --lr 0.001 --weight-decay 0 --dropout 0."
    )
    _train_options(sub)
    _machine_options(sub)

    sub = command("sample", _later("sample"), "Draw images from a trained flow into one PNG.")
    sub.add_argument("run", type=_name, metavar="RUN", help="folder of a run, or a model.safetensors file")
    sub.add_argument("--count", type=_whole(1), default=64, metavar="N", help="images (default 64)")
    sub.add_argument(
        "--temperature",
        type=_number(0, 1000),
        default=1.0,
        metavar="T",
        help="scales the latent's standard deviation; below 1 gives cleaner, less varied images (default 1)",
    )
    sub.add_argument(
        "--class", dest="label", type=_name, metavar="K", help="name or number of a class (default: all in turn)"
    )
    sub.add_argument("--out", type=_name, metavar="FILE", help="PNG to write (default: samples.png in the run folder)")
    sub.add_argument("--npz", type=_name, metavar="FILE", help="also write the images as uint8 [N, H, W, C]")
    sub.add_argument("--seed", type=_whole(0), default=0, metavar="N", help="of the draws (default 0)")
    _machine_options(sub)

    sub = command("evaluate", _later("evaluate"), "Bits per dimension with standard error; largest round-trip error.")
    sub.add_argument("run", type=_name, metavar="RUN", help="folder of a run, or a model.safetensors file")
    sub.add_argument(
        "--data",
        type=_name,
        metavar="digits|PATH",
        help="other images, brought to the flow's size (default: the run's test part)",
    )
    sub.add_argument("--draws", type=_whole(1), default=20, metavar="N", help="dequantisation draws (default 20)")
    sub.add_argument("--seed", type=_whole(0), default=0, metavar="N", help="of the draws (default 0)")
    sub.add_argument("--json", action="store_true", help="print JSON")
    _machine_options(sub)

    sub = command("info", _info, "Versions, devices, and which kernel serves each op and why.")
    sub.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _later(name: str) -> Callable[[argparse.Namespace], int]:
    """A command of ``training/commands.py``, imported (with torch) when it is run."""
    return lambda options: getattr(importlib.import_module(f"{__package__}.training.commands"), name)(options)


def _train_options(sub: Any) -> None:
    recipe, shape = Recipe(), GlowShape()
    where = sub.add_argument_group("data and folders")
    where.add_argument(
        "--data",
        type=_name,
        metavar="digits|PATH",
        help="the digits (default); a folder of images, flat or one sub-folder per class; a folder of idx files "
        "(MNIST) or of CIFAR's python batches; an .npz or .npy file of uint8 images",
    )
    where.add_argument("--size", type=_size, metavar="N|HxW", help="resize and crop the images to this size")
    where.add_argument("--channels", type=int, choices=(1, 3), help="1 makes colour images grey, 3 grey ones RGB")
    where.add_argument("--out", type=_name, metavar="DIR", help="run folder (default: the next free runs/<data>-<n>)")
    where.add_argument(
        "--resume", type=_name, metavar="RUN", help="go on with the run in this folder, exactly where it stopped"
    )

    model = sub.add_argument_group("model")
    model.add_argument("--levels", type=_whole(1), metavar="N", help="levels (default: by image size, 3 at most)")
    depth = shape.depth if isinstance(shape.depth, int) else ",".join(map(str, shape.depth))
    model.add_argument(
        "--depth", type=_depth, metavar="N[,N...]", help=f"Glow steps of every level, or of each (default {depth})"
    )
    model.add_argument("--width", type=_whole(1), metavar="N", help=f"of the networks (default {shape.width})")
    model.add_argument("--dropout", type=_number(0, 1), metavar="P", help=f"default {shape.dropout:g}")
    model.add_argument("--classes", action="store_true", help="condition on the class of each image")

    how = sub.add_argument_group("training")

    def option(name: str, kind: Callable[[str], Any], text: str, metavar: str | None = "N", **rest: Any) -> None:
        default = getattr(recipe, name)
        text = f"{text} (default {default if isinstance(default, str) else f'{default:g}'})"
        how.add_argument("--" + name.replace("_", "-"), type=kind, metavar=metavar, help=text, **rest)

    option("steps", _whole(1), "optimiser steps in all; on --resume, more stretch the schedule to the new end")
    option("batch_size", _whole(1), "images per step")
    option("lr", _number(0, above=True), "largest learning rate", "X")
    option("schedule", str, "of the learning rate", None, choices=SCHEDULES)
    option("warmup", _whole(0), "steps over which the learning rate rises")
    option("weight_decay", _number(0), "of the networks' convolutions", "X")
    option("clip", _number(0), "largest gradient norm, 0 for any", "X")
    option("ema", _number(0, 1), "averaging of the weights, 0 for none", "X")
    option("validate_every", _whole(1), "steps between validations")
    option("patience", _whole(1), "validations without a new best that end the run")
    option("log_every", _whole(1), "steps per line of metrics.jsonl")
    option("seed", _whole(0), "of weights, data order, noise and dropout")
    progress = how.add_mutually_exclusive_group()
    progress.add_argument(
        "--progress",
        choices=("auto", "bar", "lines", "none"),
        default="auto",
        help="how to show it (default auto: a bar on a terminal, lines elsewhere)",
    )
    progress.add_argument(
        "-q", "--quiet", dest="progress", action="store_const", const="none", help="as --progress none"
    )


def _machine_options(sub: Any) -> None:
    where = sub.add_argument_group("machine")
    where.add_argument("--device", type=_device_name, metavar="NAME", help="cpu, cuda, cuda:1 (default: cuda if here)")
    where.add_argument(
        "--threads", type=_whole(1, most_threads()), metavar="N", help="CPU threads (default: PyTorch's own choice)"
    )


# --- types of options: their messages follow "argument --steps: " ---------------------------------------------------


def _name(text: str) -> str:
    """Of a file, folder or class. An empty one is mostly a shell variable that is not set: never a default."""
    if not text:
        raise argparse.ArgumentTypeError("'': expected a name; leave the option away for its default")
    return text


def _whole(least: int, most: int = 2**32 - 1) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, at least {least} and at most {most}")
        return value

    return parse


def _number(least: float, below: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value < below or (above and value == least):
            bounds = f"above {least:g}" if above else f"of at least {least:g}"
            upper = "" if below == math.inf else f" and below {below:g}"
            raise argparse.ArgumentTypeError(f"{text!r}: expected a number {bounds}{upper}")
        return value

    return parse


def _depth(text: str) -> int | tuple[int, ...]:
    counts = tuple(_whole(1)(part) for part in text.split(","))
    return counts[0] if len(counts) == 1 else counts


def _size(text: str) -> list[int]:
    match = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", text.lower())
    size = [int(match[1]), int(match[2] or match[1])] if match else [0]
    if not all(1 <= side <= _LARGEST_SIDE for side in size):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected a size such as 32, or height x width such as 28x32, {_LARGEST_SIDE} at most"
        )
    return size


def _device_name(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,2})?", text):  # torch numbers no more than 128 devices
        raise argparse.ArgumentTypeError(f"{text!r}: expected auto, cpu, cuda, cuda:<0 to 99> or mps")
    return text
