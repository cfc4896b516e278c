"""``python -m benchmarks gpu | cpu | complexity | linear | density | demo | glow | peers | report``; see README.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
STAGES = ("build", "tests", "sanitizer", "peers")


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
        ("density", "time splines and small flows against what others write"),
    ):
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--out", type=Path, default=RESULTS, help="results go to OUT/<device>/ (default: %(default)s)")
        sub.add_argument("--quick", action="store_true", help="the smallest sizes, hardly timed: does it run?")
        sub.add_argument("--commit", help="the commit measured, where the tree has no git")
        if name == "density":
            sub.add_argument("--bars", nargs="+", default=[], metavar="TEXT", help="only bars that have this in them")
        if name == "complexity":
            text = "budget; layers that do not fit are recorded as not reached (default: none)"
            sub.add_argument("--minutes", type=float, help=text)
            sub.add_argument("--layers", nargs="+", default=[], metavar="NAME", help="only layers that start like this")
    text = "nfkernels' Glow beside the same in plain PyTorch and normflows"
    sub = commands.add_parser("glow", help=text, description=text)
    sub.add_argument("--out", type=Path, default=RESULTS, help="results go to OUT/<device>/ (default: %(default)s)")
    sub.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    sub.add_argument("--minutes", type=float, help="budget; what does not fit is recorded as not reached")
    sub.add_argument("--seconds", type=float, help="per contender: of one measure (20), or of training (600)")
    sub.add_argument("--preset", nargs="+", default=[], metavar="NAME", help="only these setups, or depth")
    sub.add_argument("--contenders", nargs="+", default=[], metavar="NAME", help="only these")
    sub.add_argument("--quick", action="store_true", help="a tiny model, hardly timed: does it run?")
    sub.add_argument("--commit", help="the commit measured, where the tree has no git")
    sub.add_argument("--train", action="store_true", help="bits per dimension over seconds, on --data")
    sub.add_argument("--data", metavar="PATH", help="of --train: what `nfkernels train` takes (default: digits)")
    sub.add_argument("--depth", type=int, help="of --train: steps of flow per level")
    sub.add_argument("--width", type=int, help="of --train: hidden channels of the networks")
    sub.add_argument("--batch", type=int, help="of --train: images per step")
    sub.add_argument("--lr", type=float, help="of --train: largest learning rate")
    text = "two moons by our NSF and by the same in nflows: log-likelihood at equal steps, seconds"
    sub = commands.add_parser("demo", help=text, description=text)
    sub.add_argument("--out", type=Path, default=RESULTS, help="results go to OUT/<device>/ (default: %(default)s)")
    sub.add_argument("--seeds", type=int, default=5, help="(default: %(default)s)")
    sub.add_argument("--steps", type=int, default=1000, help="of training (default: %(default)s)")
    sub.add_argument("--quick", action="store_true", help="one seed, five steps: does it run?")
    sub.add_argument("--commit", help="the commit measured, where the tree has no git")
    text = "other libraries' models before and after nfkernels.accelerate, or their own tests with --suites"
    sub = commands.add_parser("peers", help=text, description=text)
    sub.add_argument("--out", type=Path, default=RESULTS, help="results go to OUT/<device>/ (default: %(default)s)")
    sub.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    sub.add_argument("--case", nargs="+", default=[], metavar="NAME", help="only models that have this in their name")
    sub.add_argument("--seconds", type=float, help="of each measure, before and after together (default: 15)")
    sub.add_argument("--steps", type=int, help="of the loss curves (default: 100)")
    sub.add_argument("--minutes", type=float, help="budget; what does not fit is recorded as not reached")
    text = "run the libraries' tests, as they are and swapped, from the source distributions unpacked in DIR"
    sub.add_argument("--suites", type=Path, metavar="DIR", help=text)
    text = "single layers on tables of many sizes on the CPU: below which a swap does not pay"
    sub.add_argument("--sizes", action="store_true", help=text)
    sub.add_argument("--quick", action="store_true", help="tiny models, hardly timed: does it run?")
    sub.add_argument("--commit", help="the commit measured, where the tree has no git")
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
            from . import bars
            from .complexity.bars import BARS

            return bars.run("linear", BARS, args.out, quick=args.quick, commit=args.commit)
        if args.command == "density":
            from .density import run

            return run(args.out, quick=args.quick, commit=args.commit, names=args.bars)
        if args.command == "glow":
            return glow(args)
        if args.command == "peers":
            return peers(args)
        if args.command == "demo":
            from . import demo

            return demo.run(args.out, quick=args.quick, commit=args.commit, seeds=args.seeds, steps=args.steps)
        common = {"minutes": args.minutes, "quick": args.quick, "names": args.ops, "commit": args.commit}
        if args.command == "gpu":
            from . import gpu

            return gpu.run(args.out, skip=args.skip, **common)
        from . import cpu

        return cpu.run(args.out, **common)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


def glow(args: argparse.Namespace) -> int:
    common = {"device": args.device, "quick": args.quick, "names": args.contenders, "commit": args.commit}
    if args.seconds is not None:
        common["seconds"] = args.seconds
    if args.train:
        from .glow import train

        sizes = {name: getattr(args, name) for name in ("depth", "width", "batch", "lr") if getattr(args, name)}
        return train.run(args.out, data=args.data or "digits", **common, **sizes)
    from .glow import run

    return run.run(args.out, minutes=args.minutes, only=args.preset, **common)


def peers(args: argparse.Namespace) -> int:
    common = {"quick": args.quick, "names": args.case, "commit": args.commit}
    if args.suites is not None:
        from .peers import suites

        return suites.run(args.out, args.suites, **common)
    if args.sizes:
        from .peers import sizes

        return sizes.run(args.out, seconds=args.seconds, minutes=args.minutes, **common)
    from .peers import run

    return run.run(args.out, device=args.device, seconds=args.seconds, steps=args.steps, minutes=args.minutes, **common)


if __name__ == "__main__":
    sys.exit(main())
