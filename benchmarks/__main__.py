"""The command line: ``python -m benchmarks gpu | cpu | report`` (benchmarks/README.md says what each does)."""

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
    text = "results to README tables and plots"
    sub = commands.add_parser("report", help=text, description=text)
    sub.add_argument("--check", action="store_true", help="write nothing; exit 1 if the README is not what results say")
    return top


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    if args.command == "report":
        from . import report

        return report.run(check=args.check)
    common = {"minutes": args.minutes, "quick": args.quick, "names": args.ops, "commit": args.commit}
    try:
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
