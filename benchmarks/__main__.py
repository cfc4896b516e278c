"""The command line: ``python -m benchmarks gpu | cpu | complexity | linear | report`` (see benchmarks/README.md)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
STAGES = ("build", "tests", "sanitizer")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description="Measures the ops.")
    commands = top.add_subparsers(dest="command", required=True)
    for name, text in (("gpu", "build, test and measure on this GPU"), ("cpu", "measure the CPU kernels and peers")):
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--out", type=Path, default=RESULTS, help="results go to OUT/<device>/ (default: %(default)s)")
        minutes = 8.0 if name == "gpu" else None
        text = "budget; what does not fit is recorded as not reached (default: %(default)s)"
        sub.add_argument("--minutes", type=float, default=minutes, help=text)
        sub.add_argument("--ops", nargs="+", default=[], metavar="OP", help="only these")
        sub.add_argument("--quick", action="store_true", help="tiny shapes, nothing compiled: does it run?")
        sub.add_argument("--commit", help="the commit measured, where the tree has no git")
        if name == "gpu":
            sub.add_argument("--skip", nargs="+", default=[], choices=STAGES, help="stages to leave out")
    for name, text in (
        ("complexity", "count and time the linear flows over their size"),
        ("linear", "time linear flows against what others write"),
    ):
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--out", type=Path, default=RESULTS, help="results go to OUT/<device>/ (default: %(default)s)")
        sub.add_argument("--quick", action="store_true", help="the smallest sizes, hardly timed: does it run?")
        sub.add_argument("--commit", help="the commit measured, where the tree has no git")
        if name == "complexity":
            text = "budget; layers that do not fit are recorded as not reached (default: none)"
            sub.add_argument("--minutes", type=float, help=text)
            sub.add_argument("--layers", nargs="+", default=[], metavar="NAME", help="only layers that start like this")
    text = "results to README tables and plots"
    sub = commands.add_parser("report", help=text, description=text)
    sub.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is not what results say")
    return top


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    if args.command == "report":
        from . import report

        return report.run(check=args.check)
    try:
        if args.command == "complexity":
            from .complexity import run

            return run.run(args.out, minutes=args.minutes, quick=args.quick, names=args.layers, commit=args.commit)
        if args.command == "linear":
            from .complexity import bars

            return bars.run(args.out, quick=args.quick, commit=args.commit)
        common = {"minutes": args.minutes, "quick": args.quick, "names": args.ops, "commit": args.commit}
        if args.command == "gpu":
            from . import gpu

            return gpu.run(args.out, skip=args.skip, **common)
        from . import cpu

        return cpu.run(args.out, **common)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
