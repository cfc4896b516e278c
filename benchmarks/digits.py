"""Training steps per second of the quick start's Glow, against the same model in plain PyTorch, side by side.

    python benchmarks/digits.py [--seconds 30] [--out FILE.json]

Both get the same weights and must give the same bits per dimension before anything is timed. A step is: draw a batch,
dequantise, forward, backward, clip, AdamW, average the weights. The plain model is timed with torch's default AdamW and
with the fused one; blocks of steps alternate, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from models.plain_glow import PlainGlow, copy_weights

import nfkernels
from nfkernels.models import Glow
from nfkernels.training import GlowShape, Recipe, auto_levels, load_images, split
from nfkernels.training.samples import as_samples
from nfkernels.training.trainer import Trainer


class Plain:
    """The plain model's own loop, with the same work in a step."""

    def __init__(self, model: PlainGlow, images: torch.Tensor, recipe: Recipe, fused: bool | None) -> None:
        self.model, self.images, self.recipe = model, images, recipe
        self.parameters = list(model.parameters())
        self.adam = torch.optim.AdamW(self.parameters, lr=1e-4, fused=fused)
        self.averages = [p.detach().clone() for p in self.parameters]

    def step(self) -> None:
        batch = self.images[torch.randint(len(self.images), (self.recipe.batch_size,))]
        x = (batch + torch.rand(batch.shape)) / self.model.grey_levels
        loss = self.model.bits_per_dim(x).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        self.adam.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.parameters, 0.01)
        self.adam.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="time per contender")
    parser.add_argument("--out", help="write the result as JSON")
    args = parser.parse_args()

    torch.manual_seed(0)
    train, _, _ = split(load_images("digits"), seed=0)
    shape, recipe = GlowShape(), Recipe(lr=1e-4, warmup=0)
    options = {
        "levels": auto_levels(8, 8),
        "steps": shape.depth,
        "hidden": shape.width,
        "grey_levels": 17,
        "dropout": shape.dropout,
    }
    glow = Glow((1, 8, 8), dropout_of=shape.dropout_of, **options)
    trainer = Trainer(glow, as_samples(train, glow), None, recipe, None)
    trainer.begin()
    for _ in range(5):  # weights that are not zero
        trainer.step()

    plain = PlainGlow((1, 8, 8), **options)
    copy_weights(plain, glow)
    x = glow.dequantize(train.images[:64])
    glow.eval(), plain.eval()
    with torch.no_grad():
        ours = glow.nll(x)
        theirs = plain.bits_per_dim(x).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    print(f"same weights: {ours:.6f} and {theirs:.6f} bits per dimension")
    glow.train(), plain.train()

    contenders = {
        "nfkernels": trainer.step,
        "plain PyTorch": Plain(plain, train.images, recipe, None).step,
        "plain PyTorch, fused AdamW": Plain(plain, train.images, recipe, True).step,
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + args.seconds * len(contenders)
    while time.perf_counter() < end:
        for name, step in contenders.items():
            step()
            start = time.perf_counter()
            for _ in range(5):
                step()
            rates[name].append(5 / (time.perf_counter() - start))
    result = {name: round(statistics.median(r), 2) for name, r in rates.items()}
    for name, rate in result.items():
        print(f"{name:28s} {rate:6.2f} steps/s   x {rate / result['plain PyTorch']:.2f}")
    if args.out:
        facts = {"torch": torch.__version__, "nfkernels": nfkernels.__version__, "threads": torch.get_num_threads()}
        with open(args.out, "w", encoding="utf-8") as f:
            json.dump({**facts, "model": options, "steps_per_second": result}, f, indent=2)


if __name__ == "__main__":
    main()
