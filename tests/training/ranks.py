"""What a process of ``test_distributed.py`` does: ``python ranks.py FOLDER CASE...`` with torchrun's environment.

Every case leaves ``FOLDER/CASE-RANK.json`` and rank 0's run in ``FOLDER/CASE``.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tiny import QUICK, glow, stripes, tabular

from nfkernels.models import Glow
from nfkernels.training import fit, load_images
from nfkernels.training.data.image_data import need
from nfkernels.training.distributed import launched

STEPS = 12


def small(**options: Any) -> Glow:
    torch.manual_seed(0)
    return Glow((1, 4, 4), **{"levels": 1, "steps": 2, "hidden": 8, "grey_levels": 5, "dropout": 0.0, **options})


def pictures() -> Any:
    """A stream of 42 pictures of 16 grey levels, from files of this process's own."""
    image = need("PIL.Image", "the pictures of a test")
    folder = tempfile.TemporaryDirectory(prefix="pictures-")
    atexit.register(folder.cleanup)
    for at, values in enumerate(stripes(42).images[:, 0]):
        image.fromarray((values * 60).numpy()).save(Path(folder.name) / f"{at:03}.png")
    return load_images(folder.name, stream=True, channels=1, bits=4, workers=0)


# By name: the flow, its images, and what is different from QUICK. The validation is longer than a chunk of it.
CASES: dict[str, Any] = {
    "plain": (lambda: glow(dropout=0.0), stripes(42), {}),
    "parts": (lambda: glow(dropout=0.0), stripes(42), {"accumulate": 2}),
    "flips": (lambda: glow(dropout=0.0), stripes(42), {"flip": True}),
    "classes": (lambda: glow(dropout=0.0, classes=2), stripes(42, labels=True), {}),
    "variational": (lambda: small(dequantization="variational"), stripes(42), {}),
    "reversible": (lambda: small(memory="reversible"), stripes(42), {"accumulate": 2}),
    "tabular": (tabular, torch.randn(42, 2, generator=torch.Generator().manual_seed(0)), {}),
    "clipped": (lambda: glow(dropout=0.0), stripes(42), {"clip": 0.1, "optimizer": "adamax"}),
    "streamed": (lambda: small(grey_levels=16), pictures, {}),
    # Every rank drops out for itself, so nothing equals one process: but the run repeats itself, and can be resumed.
    "dropout": (glow, stripes(42), {}),
}


def run(case: str, folder: Path | None, **more: Any) -> dict[str, Any]:
    """The history of a case, and its final weights as numbers."""
    build, data, changes = CASES[case]
    flow, data = build(), data() if callable(data) else data
    held_out = data[:30] if isinstance(data, torch.Tensor) else stripes(300, seed=1, labels=data.classes is not None)
    if not isinstance(data, torch.Tensor):
        held_out = dataclasses.replace(held_out, grey_levels=data.grey_levels)
    options = QUICK | {"steps": STEPS, "weight_decay": 0.1, "run": folder} | changes | more
    result = fit(flow, data, validation=held_out, **options)
    weights = {name: tensor.double().flatten().tolist() for name, tensor in flow.state_dict().items()}
    return {"history": result.history, "best": result.best, "step": result.step, "weights": weights}


def main() -> None:
    torch.set_num_threads(1)
    folder, cases = Path(sys.argv[1]), sys.argv[2:]
    rank = launched().rank
    for case in cases:
        if case == "resumed":
            run("dropout", folder / case, callback=lambda now: rank == 1 and now.step == 7)
            ended = run("dropout", folder / case, resume=True)
        else:
            ended = run(case, folder / case)
        (folder / f"{case}-{rank}.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main()
