"""``python -m benchmarks glow --train``: bits per dimension against seconds, each for the same wall clock.

Everyone starts from the same weights (ActNorm from the same images), with the same recipe and order of the images, and
is told before it begins how many steps its seconds hold (from its own speed in a few steps that are thrown away), so
that its learning rate falls to zero as its time ends. Validations do not count as time. Everyone's averaged weights are
judged by the same plain model in float32, on the same dequantised images.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nfkernels.models import Glow
from nfkernels.training import GlowShape, Recipe, auto_levels, load_images, split

from ..models import plain_glow
from . import page, picture
from .measure import noted, repeat, seconds_of, settle
from .models import Ours, PlainLoop, Ready, Unavailable, build, make, options
from .run import opened
from .setups import Setup, taking_part

DEFAULT = {"cpu": ("nfkernels", "plain"), "cuda": ("nfkernels, reversible, bf16, graph", "plain")}
POINTS = 20  # of a curve
VALIDATED = 512  # images at each of them


class Run:
    """A contender in training: ``step()``, and ``bits(images)`` of its averaged weights."""

    def __init__(self, ready: Ready, images: Tensor, recipe: Recipe) -> None:
        self.ready, setup = ready, ready.setup
        self.judge = plain_glow.PlainGlow(setup.shape, **options(setup)).eval().to(ready.device)
        if isinstance(ready, Ours):
            self.trainer = ready.trainer(images, recipe)
            self.step, self.averaged = self.trainer.step, self.trainer._optimizer.averaged
        else:
            loop = PlainLoop(ready, images, recipe)
            self.step, self.averaged = loop.step, loop.averaged

    @torch.no_grad()
    def bits(self, images: Tensor, batch: int = 128) -> Tensor:
        """``[N]``, on the CPU. The noise is the same at every call."""
        model, found = self.ready.model, []
        generator = torch.Generator().manual_seed(0)
        with self.averaged():
            if isinstance(model, plain_glow.PlainGlow):
                self.judge.load_state_dict(model.state_dict())
            elif isinstance(model, Glow):
                plain_glow.copy_weights(self.judge, model)
            else:
                raise Unavailable("normflows' Glow is another model (no split priors): it is not trained here")
        for part in images.split(batch):
            x = (part + torch.rand(part.shape, generator=generator)) / self.judge.grey_levels
            found.append(self.judge.bits_per_dim(x.to(self.ready.device)).cpu())
        return torch.cat(found)


def run(
    out: Path,
    *,
    device: str,
    data: str,
    quick: bool,
    names: list[str],
    commit: str | None,
    seconds: float = 600.0,
    depth: int | None = None,
    width: int | None = None,
    batch: int = 64,
    lr: float | None = None,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> int:
    """Trains each contender for ``seconds``, writes ``out/<device>/glow-<date>-<commit>.json`` and a picture."""
    loaded = load_images(data)
    train, validation, test = split(loaded, seed=0)
    shape = GlowShape()
    if quick:
        seconds, depth, width = min(seconds, 1.0), 1, 8
        validation, test = (part.images[:32] for part in (validation, test))
    else:
        validation, test = validation.images[:VALIDATED], test.images
    size = tuple(train.images.shape[1:])
    setup = Setup(
        f"train-{loaded.name}", "", size, auto_levels(*size[1:]), depth or shape.depth, width or shape.width,
        batch, loaded.grey_levels, shape.dropout if data == "digits" else 0.0,
    )  # fmt: skip
    text = f"Training on {loaded.name}, {seconds:,.0f} s each on {device}: K = {setup.steps}, L = {setup.levels}, "
    setup = dataclasses.replace(setup, text=f"{text}width {setup.hidden}, batch {setup.batch}")
    recipe = Recipe(batch_size=batch, **({"weight_decay": 0.0, "lr": 1e-3} if data != "digits" else {}))
    if lr is not None:
        recipe = dataclasses.replace(recipe, lr=lr)
    contenders = taking_part(device, names or DEFAULT[device])
    saved = opened(out, device, None, quick, commit, say)
    say(setup.text)
    where = torch.device(device)
    torch.manual_seed(0)
    glow = build(setup)
    glow.initialize(train.images[:512])
    with saved.whole():
        found: dict[str, Any] = {c.name: {"status": "not reached"} for c in contenders}
        entry = {"id": setup.id, "setup": setup.facts(), "recipe": dataclasses.asdict(recipe), "contenders": found}
        saved.add(entry)
        for contender in contenders:
            with noted(found[contender.name]):
                ready = make(contender, setup, glow, where)
                trial = make(contender, setup, glow, where)
                pace = speed(Run(trial, train.images, dataclasses.replace(recipe, steps=10**6)), where, seconds / 40)
                del trial
                settle(where)
                told = dataclasses.replace(recipe, steps=max(1, int(seconds / pace)))
                result = timed(Run(ready, train.images, told), told, seconds, validation, test, say)
                found[contender.name] |= {"status": "measured", **result}
                del ready
            settle(where)
            saved.save()
            say(f"  {contender.name}: " + told_line(found[contender.name]))
    if not quick:
        known = page.newest(page.runs(saved.path.parent))
        for of in known["entries"]:
            if of["id"] == setup.id:
                picture.draw(of, known, saved.path.with_name(page.picture_name(setup.id)))
    say(f"\n{page.train_table(entry)}\n\n{saved.path}")
    found_wrong = page.problems([entry])
    for problem in found_wrong:
        say(f"PROBLEM: {problem}")
    return 1 if found_wrong else 0


def speed(run: Run, device: torch.device, seconds: float) -> float:
    """Seconds per step, after the first few."""
    for _ in range(3):
        run.step()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        times.append(seconds_of(partial(repeat, run.step, 5), device) / 5)
    return sum(times) / len(times)


def timed(run: Run, recipe: Recipe, seconds: float, validation: Tensor, test: Tensor, say) -> dict[str, Any]:
    """Trains until the time or the steps are over; the clock stands still while it is judged."""
    device = run.ready.device
    used, steps, curve, due = 0.0, 0, [], 0.0
    chunk = max(1, recipe.steps // 400)

    def judged() -> None:
        bits = run.bits(validation).mean().item()
        curve.append([round(used, 2), steps, round(bits, 5) if math.isfinite(bits) else None])
        say(f"    {used:,.0f} s, {steps:,} steps: {bits:.3f} bits/dim")

    while used < seconds and steps < recipe.steps:
        if used >= due:
            judged()
            due = used + seconds / POINTS
        count = min(chunk, recipe.steps - steps)
        used += seconds_of(partial(repeat, run.step, count), device)
        steps += count
    judged()
    bits = run.bits(test).double()
    mean = bits.mean().item()
    spread = bits.std().item() / max(1, len(bits)) ** 0.5
    known = {"test_bits": mean, "test_bits_error": spread} if math.isfinite(mean) else {"test_bits": None}
    return {"seconds": round(used, 1), "steps": steps, "planned_steps": recipe.steps, "curve": curve, **known}


def told_line(found: dict[str, Any]) -> str:
    if found["status"] != "measured":
        return f"{found['status']} ({found['reason']})"
    bits = found["test_bits"]
    return f"{found['steps']:,} steps, test {'not finite' if bits is None else f'{bits:.3f} bits/dim'}"
