"""Images: train a small Glow on 8 x 8 digits, sample it, walk between two images, score images by their likelihood.

    python examples/images.py

Prints bits per dimension of the test images (lower is better) beside those of independent pixels, and how well the
likelihood tells digits from images that are none (AUROC: 0.5 is guessing, 1 perfect). Writes ``training.png``,
``samples.png``, ``interpolation.png`` and ``scores.png`` (the sixteen most and the sixteen least likely test images).
The model is small and its training short: ``nfkernels train`` takes longer and gets further.
"""

import argparse
from pathlib import Path

import torch

from nfkernels import diagnostics, plot
from nfkernels.models import Glow
from nfkernels.training import evaluate, fit, independent_pixel_bits, load_images, split


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("images"), help="folder for the pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400, help="training steps")
    options = parser.parse_args(argv)
    if options.steps < 1 or options.out.is_file():
        parser.error("expected --steps of at least 1, and a folder as --out")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)

    # Train. uint8 [N, 1, 8, 8] of 17 grey levels; load_images reads a folder of your pictures as well.
    train, validation, test = split(load_images("digits"), seed=0)
    flow = Glow(train.image_shape, levels=2, steps=6, hidden=32, grey_levels=train.grey_levels)
    # A high rate that falls to zero: for a short training. Longer ones want a lower rate, and dropout.
    result = fit(flow, train, validation=validation, steps=options.steps, lr=2e-2, schedule="cosine", seed=options.seed)
    flow.eval()
    bits = evaluate(flow, test, draws=5)  # an upper bound: images get noise between their grey levels
    pixels = independent_pixel_bits(train, validation, test).mean
    print(f"bits per dimension: {bits.mean:.3f} +- {bits.standard_error:.3f}; of independent pixels {pixels:.3f}")

    # Sample. A temperature below 1 gives cleaner and less varied images.
    generator = torch.Generator().manual_seed(options.seed)
    samples = flow.sample(64, temperature=0.8, generator=generator)  # uint8 [64, 1, 8, 8]

    # Interpolate. A straight line between two images shows both at once; between their latents, images of the flow.
    first, last = flow.encode(test.images[:6]), flow.encode(test.images[6:12])  # [6, 64] each
    path = torch.stack([first.lerp(last, t) for t in torch.linspace(0, 1, 9).tolist()], dim=1)  # [6, 9, 64]
    rows = flow.decode(path.flatten(0, 1)).unflatten(0, (6, 9))  # uint8 [6, 9, 1, 8, 8]

    # Score. Bits per dimension of every image: the more, the less likely.
    score = flow.bits_per_dim(test.images, draws=5, generator=generator)  # [297]
    shuffled = test.images.flatten(1)[:, torch.randperm(64)].view_as(test.images)  # the same pixels in another order
    upside_down = test.images.flip(2)
    numbers = {"bits": bits.mean, "independent": pixels}
    for name, others in {"shuffled": shuffled, "upside_down": upside_down}.items():
        numbers[name] = diagnostics.auroc(score, flow.bits_per_dim(others, draws=5, generator=generator))
        print(f"digits against the same {name.replace('_', ' ')}: AUROC {numbers[name]:.3f}")
    order = score.argsort()
    extremes = test.images[torch.cat([order[:16], order[-16:]])]

    pictures = {
        "training": plot.training_curve(result.history, baselines={"independent pixels": pixels}),
        "samples": plot.image_grid(samples, grey_levels=flow.grey_levels),
        "interpolation": plot.interpolation(rows, grey_levels=flow.grey_levels),
        "scores": plot.image_grid(
            extremes, columns=16, grey_levels=flow.grey_levels, title="most likely (above) and least likely test images"
        ),
    }
    for name, figure in pictures.items():
        plot.save(figure, options.out / f"{name}.png")
        print(f"wrote {options.out / name}.png")
    return numbers


if __name__ == "__main__":
    main()
