"""The commands: what each takes, what it runs, and examples of it. A new command is a new row of the table."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..training.config_file import read_config
from ..training.demo.options import DEMO, NAMES, demo_name
from ..training.option import name as named
from ..training.option import number, several, whole
from ..training.options import TRAIN, as_text, merged
from ..training.tables.kind import is_table_run
from .completion import SHELLS, completion
from .errors import is_main
from .info import info
from .options import add_data, add_json, add_machine, add_pictures, add_quiet, add_run, add_seed, add_table, typed

Example = tuple[str, str]  # what it does, and the line to type


@dataclass(frozen=True)
class Command:
    """One command.

    Args:
        summary: one sentence for ``--help``.
        options: adds its options to a parser.
        run: does it, and returns the exit status.
        examples: for ``--help``; a test parses them.
        notes: a paragraph for ``--help``.
        less: what to try where there is not enough memory.
    """

    summary: str
    options: Callable[[Any], None]
    run: Callable[[argparse.Namespace], int]
    examples: tuple[Example, ...]
    notes: str = ""
    less: str = "free some"


# --- train ----------------------------------------------------------------------------------------------------------


def _train_options(sub: Any) -> None:
    """Without defaults: what nobody gives may still come from a file or a preset."""
    groups = add_table(sub, TRAIN, argparse.SUPPRESS)
    add_quiet(groups["training"], argparse.SUPPRESS)
    add_json(groups["training"])
    where = sub.add_argument_group("files of options")
    where.add_argument(
        "--config",
        type=typed(named),
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


def _train(options: argparse.Namespace) -> int:
    """Brings together what command line, file and preset ask for; then trains, or prints it."""
    given = {option: value for option, value in vars(options).items() if option in TRAIN}
    asked = merged(given, {} if options.config is None else read_config(options.config, TRAIN))
    if options.print_config is not None:
        if is_main():
            print(as_text(asked, options.print_config))
        return 0
    every = {option: asked.get(option) for option in TRAIN}
    return _later("train", "commands")(argparse.Namespace(**every, json=options.json))


# --- what is done with a trained flow -------------------------------------------------------------------------------

_TEMPERATURE = number(0, 1000)


def _sample_options(sub: Any) -> None:
    add_run(sub)
    sub.add_argument(
        "--count",
        type=typed(whole(1)),
        metavar="N",
        help="images (default 64; of --temperatures, 8 for each), or rows of a table (default 1000; 1 for each row "
        "of a file that --context names)",
    )
    heat = sub.add_mutually_exclusive_group()
    heat.add_argument(
        "--temperature",
        type=typed(_TEMPERATURE),
        default=1.0,
        metavar="T",
        help="scales the latent's standard deviation; below 1 gives cleaner, less varied images (default 1)",
    )
    heat.add_argument(
        "--temperatures",
        type=typed(several(_TEMPERATURE)),
        metavar="T,T...",
        help="a row of images for each, all from the same noise, such as 0.5,0.7,0.9,1.0",
    )
    sub.add_argument(
        "--class",
        dest="label",
        type=typed(named),
        metavar="K",
        help="name or number of a class (default: all in turn)",
    )
    sub.add_argument(
        "--context",
        type=typed(named),
        metavar="A=X,...|FILE",
        help="of a table's flow that was trained with --context: the values of these columns, or a table of them",
    )
    add_pictures(sub, "samples.png", "; of a table .csv, .npy or .parquet: samples.csv")
    add_seed(sub)
    add_json(sub)
    add_machine(sub)


def _interpolate_options(sub: Any) -> None:
    add_run(sub)
    add_data(sub)
    sub.add_argument("--pairs", type=typed(whole(1)), default=4, metavar="N", help="rows (default 4)")
    sub.add_argument(
        "--steps",
        type=typed(whole(2)),
        default=9,
        metavar="M",
        help="images of a row; the first and the last are the two, through the flow and back (default 9)",
    )
    add_pictures(sub, "interpolation.png")
    add_seed(sub, "of the choice of images")
    add_json(sub)
    add_machine(sub)


def _evaluate_options(sub: Any) -> None:
    add_run(sub)
    add_data(sub)
    sub.add_argument("--draws", type=typed(whole(1)), default=20, metavar="N", help="dequantisation draws (default 20)")
    sub.add_argument(
        "--importance-samples",
        type=typed(whole(1)),
        metavar="K",
        help="also the tighter bound from the mean density of K draws per image",
    )
    sub.add_argument(
        "--against",
        type=typed(named),
        metavar="digits|PATH",
        help="other images, or another table: how well out-of-distribution scores tell them from these (AUROC)",
    )
    add_seed(sub)
    sub.add_argument(
        "--out",
        type=typed(named),
        metavar="FILE",
        help="of a table: also write the log-density of each row, in nats, to this .csv, .npy or .parquet",
    )
    sub.add_argument(
        "--missing",
        choices=("refuse", "drop"),
        default="refuse",
        help="rows of --data that lack a value: an error, or left out (default refuse)",
    )
    add_json(sub)
    add_machine(sub)


# --- demo, info, completion -----------------------------------------------------------------------------------------


def _demo_options(sub: Any) -> None:
    sub.add_argument("name", type=typed(demo_name), choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    groups = add_table(sub, DEMO, None)
    add_quiet(groups["training"], None)
    add_json(groups["training"])


def _completion_options(sub: Any) -> None:
    sub.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))


# --- the table ------------------------------------------------------------------------------------------------------


def _later(command: str, module: str) -> Callable[[argparse.Namespace], int]:
    """A command of ``training/<module>.py``, imported (with torch) when it is run."""
    return lambda options: getattr(importlib.import_module(f"nfkernels.training.{module}"), command)(options)


def _of_run(command: str) -> Callable[[argparse.Namespace], int]:
    """A command on a trained flow, as its kind of data asks for."""

    def run(options: argparse.Namespace) -> int:
        module = "tables.commands" if is_table_run(options.run) else "finished"
        return _later(command, module)(options)

    return run


COMMANDS: dict[str, Command] = {
    "train": Command(
        "Train a flow on images or a table; writes a run folder with model, metrics and pictures.",
        _train_options,
        _train,
        (
            ("the digits that come with scikit-learn", "nfkernels train"),
            ("pictures in one sub-folder per class", "nfkernels train --data photos/ --size 32 --classes"),
            ("two columns of a table, given a third", "nfkernels train --data table.csv --columns x,y --context label"),
            ("a published model", "nfkernels train --preset glow-cifar10 --data cifar-10-batches-py"),
            ("go on with a run that was stopped", "nfkernels train --resume runs/digits-1"),
            ("a file of all options, to edit and to train by", "nfkernels train --print-config > options.yaml"),
            ("... which is read again", "nfkernels train --config options.yaml --steps 500"),
            ("the outcome for a script, and nothing else", "nfkernels train --steps 100 --quiet --json > outcome.json"),
        ),
        "The defaults suit the digits: few images, so much weight decay and dropout. For tens of thousands of images "
        "try --steps 20000 --lr 0.001 --weight-decay 0 --dropout 0, or a --preset. Tables have defaults of their own.",
        "try --memory reversible, --accumulate, a smaller --batch-size, --width or --size, or fewer images",
    ),
    "sample": Command(
        "Draw from a trained flow: images into one PNG, rows into a table.",
        _sample_options,
        _of_run("sample"),
        (
            ("64 images, into the run folder", "nfkernels sample runs/digits-1"),
            (
                "a row of images for each temperature, all from the same noise",
                "nfkernels sample runs/digits-1 --temperatures 0.5,0.7,0.9,1.0 --out warmth.png",
            ),
            (
                "images of one class (of a flow trained with --classes), also as an array",
                "nfkernels sample runs/digits-1 --class 3 --count 100 --npz threes.npz",
            ),
            (
                "rows of a table (of a flow trained with --context label)",
                "nfkernels sample runs/table-1 --context label=2 --count 500 --out rows.csv",
            ),
        ),
        less="try a smaller --count",
    ),
    "interpolate": Command(
        "Images between two images, through the latents, into one PNG.",
        _interpolate_options,
        _of_run("interpolate"),
        (
            ("four pairs of test images", "nfkernels interpolate runs/digits-1"),
            (
                "eight pairs of other images, five to a row",
                "nfkernels interpolate runs/photos-1 --data others/ --pairs 8 --steps 5 --out between.png",
            ),
        ),
        less="try fewer --pairs or --steps",
    ),
    "evaluate": Command(
        "Bits per dimension or nats per row with standard error, and by level; errors of a round trip, the worst "
        "layers, values that are not finite; what tells other data apart.",
        _evaluate_options,
        _of_run("evaluate"),
        (
            ("the test part of the run's own data", "nfkernels evaluate runs/digits-1"),
            (
                "a tighter bound, as JSON",
                "nfkernels evaluate runs/digits-1 --importance-samples 50 --json",
            ),
            (
                "does the flow notice that other images are not what it was trained on?",
                "nfkernels evaluate runs/photos-1 --against others/",
            ),
            (
                "another table, with the log-density of each of its rows",
                "nfkernels evaluate runs/table-1 --data other.csv --missing drop --out densities.csv",
            ),
        ),
        less="try fewer images (--data)",
    ),
    "demo": Command(
        "A first look: pictures of a flow of the plane, in seconds.",
        _demo_options,
        _later("demo", "demo.run"),
        (
            ("two half-moons", "nfkernels demo moons"),
            ("another flow, trained for longer", "nfkernels demo rings --model maf --steps 3000 --out rings"),
            ("what a function does to a density", "nfkernels demo change-of-variables"),
        ),
        "moons, rings, checkerboard and pinwheel train a flow on points of the plane and draw its density, its warped "
        "grid, its samples, and what each layer does; change-of-variables trains nothing and draws what exp, an affine "
        "map and ln make of a normal.",
        "try a smaller --batch-size, --width or --layers",
    ),
    "info": Command(
        "Versions, devices, and which kernel serves each op and why.",
        add_json,
        info,
        (("for people", "nfkernels info"), ("for programs", "nfkernels info --json")),
    ),
    "completion": Command(
        "Print what a shell needs to complete commands, options and their values on the TAB key.",
        _completion_options,
        completion,
        (
            ("bash: a line for ~/.bashrc", 'eval "$(nfkernels completion bash)"'),
            ("zsh: a line for ~/.zshrc, after compinit", 'eval "$(nfkernels completion zsh)"'),
            ("fish: once", "nfkernels completion fish > ~/.config/fish/completions/nfkernels.fish"),
        ),
        'Needs argcomplete: pip install "nfkernels[completion]".',
    ),
}
# Of `nfkernels --help`.
EXAMPLES: tuple[Example, ...] = (
    ("draw a flow of the plane, in seconds", "nfkernels demo moons"),
    ("train a Glow on the digits that come with scikit-learn", "nfkernels train"),
    ("train a spline flow on the columns of a table", "nfkernels train --data table.csv"),
    ("draw from what was trained", "nfkernels sample runs/digits-1"),
)
