"""`nfkernels demo`, once its options are known."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import torch

from ... import plot
from .. import session
from ..as_json import print_json
from ..data.image_data import need
from ..data.toy import TOYS, Toy
from ..errors import TrainingError
from ..loop import FitResult, fit
from ..progress import reporter, unread_is_fine, wish_of
from .flow import Likelihoods, build, likelihoods, recipe
from .folder import SOFTWARE, PictureFolder
from .options import DEMO, MODELS, OF_TRAINING, VARIABLES
from .variables import change_of_variables

if TYPE_CHECKING:
    from ...nn import Flow

_TRAINING, _HELD_OUT, _DRAWN = 100_000, 10_000, 4000  # points


def demo(options: argparse.Namespace) -> int:
    """Draws one demo as ``options`` say: ``name``, ``json``, and each option of the table, None where not asked for."""
    need("matplotlib", "drawing the pictures")  # said now rather than after the training
    out = f"demo-{options.name}" if options.out is None else options.out
    session.set_threads(options.threads)
    if options.name == VARIABLES:
        useless = [DEMO[name].flag for name in OF_TRAINING if getattr(options, name) is not None]
        if useless:
            raise TrainingError(f"{VARIABLES} trains nothing: leave {', '.join(useless)} away")
        return change_of_variables(PictureFolder(out, (f"{VARIABLES}.png",)), json=options.json)
    given = {name: getattr(options, name) for name in DEMO}
    asked = {name: DEMO[name].default if value is None else value for name, value in given.items()}
    device, toy = session.pick_device(options.device), TOYS[options.name]
    folder = PictureFolder(out, (f"{toy.name}.png", f"{toy.name}-steps.png"))
    return _quick_look(toy, asked, device, folder, json=options.json)


def _quick_look(toy: Toy, asked: dict[str, Any], device: torch.device, folder: PictureFolder, *, json: bool) -> int:
    began, seed, kind = time.monotonic(), asked["seed"], MODELS[asked["model"]]
    training, held_out = toy.sample(_TRAINING, seed=2 * seed), toy.sample(_HELD_OUT, seed=2 * seed + 1)
    torch.manual_seed(seed)
    flow = build(kind, training, layers=asked["layers"], width=asked["width"]).to(device)
    if not json:
        with unread_is_fine(sys.stdout):
            _print_head(toy, asked, flow, device)
    result = fit(
        flow,
        training,
        recipe=recipe(asked["steps"], asked["batch_size"], seed),
        progress=reporter(wish_of(asked["progress"], json=json), "points"),
        signals=True,
    )
    seconds = time.monotonic() - began
    flow.eval()
    found = likelihoods(flow, toy, held_out, training)
    title = f"{toy.title}: {kind} after {session.many(result.step, 'step')}"
    page = plot.overview(flow, held_out[:_DRAWN], limits=toy.view, title=title)
    way = f"{toy.title}: from the base to the data, layer by layer"
    steps = plot.steps(flow, count=_DRAWN, limits=toy.view, seed=seed, title=way)
    for figure, picture in zip((page, steps), folder.pictures, strict=True):
        plot.save(figure, picture, software=SOFTWARE)
    if json:
        facts = {"name": toy.name, "model": asked["model"], "stopped": result.stopped, "steps": result.step}
        facts |= {"seconds": time.monotonic() - began, **found.facts(), "written": folder.pictures}
        print_json(facts)
    else:
        with unread_is_fine(sys.stdout):
            _print_result(result, found, seconds, time.monotonic() - began, folder)
    return 0 if result.signal is None else 128 + result.signal


def _print_head(toy: Toy, asked: dict[str, Any], flow: Flow, device: torch.device) -> None:
    parameters = sum(p.numel() for p in flow.parameters())
    threads = f", {session.many(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else ""
    print(
        f"{toy.title}: {MODELS[asked['model']]}, {session.many(asked['layers'], 'layer')} of width {asked['width']}, "
        f"{parameters:,} parameters, on {device}{threads}",
        flush=True,
    )


def _print_result(
    result: FitResult, found: Likelihoods, training: float, seconds: float, folder: PictureFolder
) -> None:
    if result.stopped == "signal":
        name = "Ctrl-C" if result.signal == signal.SIGINT else signal.Signals(result.signal).name
        print(f"\nstopped by {name}; what there is so far:")
    rows = {
        "the density itself": found.truth,
        "this flow": found.flow,
        "a normal": found.normal,
    }
    print(f"\nlog-likelihood of {found.points:,} points that it was not trained on, in nats, higher is better")
    for name, (mean, error) in rows.items():
        print(f"  {name:<20}{mean:7.3f} +- {error:.3f}")
    print(
        f"  {'left to learn':<20}{found.gap[0]:7.3f} +- {found.gap[1]:.3f}   (Kullback-Leibler divergence)\n"
        f"\n{session.many(result.step, 'step')} in {training:.1f} s, {seconds:.1f} s in all\n{folder.told()}",
        flush=True,
    )
