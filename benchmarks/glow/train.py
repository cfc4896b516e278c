"""``python -m benchmarks glow --train``: bits per dimension against seconds, each for the same wall clock.

Everyone starts from the same weights (ActNorm from the same images), with the same recipe and order of the images, and
a learning rate that falls to zero with the time that is left, so that the faster makes more steps and nobody's decay is
cut off. They take turns of a few thousandths of their time, so that a busy machine slows all of them alike. Validations
do not count as time; compiling does. Everyone's averaged weights are judged by the same plain model in float32, on the
same dequantised images.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nfkernels.models import Glow
from nfkernels.training import GlowShape, Recipe, auto_levels, load_images, split

from ..models import plain_glow
from . import page, picture
from .measure import noted, repeat, seconds_of
from .models import Ours, PlainLoop, Ready, Unavailable, build, make, options
from .run import opened
from .setups import Setup, taking_part

DEFAULT = {"cpu": ("nfkernels", "plain"), "cuda": ("nfkernels, reversible, bf16, graph", "plain")}
POINTS = 20  # of a curve
VALIDATED = 512  # images at each of them


@dataclasses.dataclass(frozen=True)
class ByTheClock(Recipe):
    """A recipe whose learning rate falls linearly with ``used``, the share of the time that is over."""

    used: list[float] = dataclasses.field(default_factory=lambda: [0.0])

    def lr_at(self, step: int) -> float:
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return self.lr * rise * max(0.0, 1 - self.used[0])


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
    recipe = ByTheClock(batch_size=batch, **({"weight_decay": 0.0, "lr": 1e-3} if data != "digits" else {}))
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
        running = {}
        for contender in contenders:
            with noted(found[contender.name]):
                ready = make(contender, setup, glow, where)
                own = dataclasses.replace(recipe, used=[0.0])
                trained = Run(ready, train.images, own)
                running[contender.name] = turns(trained, own, seconds, validation, test, found[contender.name])
        while running:
            for name, turn in list(running.items()):
                told = None
                with noted(found[name]):
                    told = next(turn, None)
                if told is None:
                    del running[name]
                    told = told_line(found[name])
                if told:
                    say(f"  {name}: {told}")
                    saved.save()
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


def turns(
    run: Run, recipe: ByTheClock, seconds: float, validation: Tensor, test: Tensor, found: dict[str, Any]
) -> Iterator[str]:
    """Trains until the time is over, a turn at a time, and fills ``found``. The clock stands still while it is judged.
    Gives a line after each validation, and nothing after other turns."""
    device = run.ready.device
    used, steps, due, chunk = 0.0, 0, 0.0, 1
    found["curve"] = curve = []

    def judged() -> str:
        bits = run.bits(validation).mean().item()
        curve.append([round(used, 2), steps, round(bits, 5) if math.isfinite(bits) else None])
        return f"{used:,.0f} s, {steps:,} steps: {bits:.3f} bits/dim"

    while used < seconds:
        told = ""
        if used >= due:
            told, due = judged(), due + seconds / POINTS
        recipe.used[0] = used / seconds
        took = seconds_of(partial(repeat, run.step, chunk), device)
        used, steps = used + took, steps + chunk
        chunk = max(1, int(chunk / took * min(seconds / 400, seconds - used)))
        yield told
    judged()
    bits = run.bits(test).double()
    mean = bits.mean().item()
    spread = bits.std().item() / max(1, len(bits)) ** 0.5
    known = {"test_bits": mean, "test_bits_error": spread} if math.isfinite(mean) else {"test_bits": None}
    found |= {"status": "measured", "seconds": round(used, 1), "steps": steps, **known}


def told_line(found: dict[str, Any]) -> str:
    if found["status"] != "measured":
        return f"{found['status']} ({found['reason']})"
    bits = found["test_bits"]
    return f"{found['steps']:,} steps, test {'not finite' if bits is None else f'{bits:.3f} bits/dim'}"
