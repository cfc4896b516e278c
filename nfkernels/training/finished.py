"""`nfkernels sample | interpolate | evaluate`: what is done with a trained flow."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._atomic import atomic_write
from ..nn.graph import captured
from . import session
from .as_json import print_json
from .data import DataError, ImageData, load_images
from .data.image_data import need
from .errors import TrainingError
from .evaluation import evaluate as measure
from .evaluation import images_at_once, reconstruction, round_trip_error, uniform_bits
from .examination import Samples, apart_lines, examine, level_bits, scored, told_apart
from .image_file import write_grid
from .run_folder import RunFolder
from .samples import as_samples

if TYPE_CHECKING:
    from ..nn import ImageFlow

_ROW, _GRID = 8, 64  # images that are drawn by default: of each of several temperatures, of one


# --- sample ---------------------------------------------------------------------------------------------------------


def sample(options: argparse.Namespace) -> int:
    if options.context is not None:
        raise TrainingError(f"--context is for tables, and {options.run} is a flow over images: did you mean --class?")
    session.set_threads(options.threads)
    device = session.pick_device(options.device)
    flow, folder, config = session.open_run(options.run, device)
    names = session.class_names(flow, config)
    label = None if options.label is None else session.class_index(options.label, names)
    out = _picture(options, folder, "samples")
    count = options.count or (_ROW if options.temperatures else _GRID)
    temperatures = options.temperatures or (options.temperature,)
    with session.using(options.run), session.computing(options.precision or session.precision_of(config), device):
        images = torch.cat([draw(flow, count, names, label, warmth, options.seed) for warmth in temperatures])
    write_grid(out, images, grey_levels=flow.grey_levels, columns=count if options.temperatures else None)
    files = [out, *_write_npz(options, images)]
    if options.json:
        facts = {"images": len(images), "temperatures": temperatures, "seed": options.seed}
        print_json(facts | {"class": None if label is None else names[label], "written": files})
        return 0
    of_class = "" if label is None else f" of class {names[label]}"
    each = " at each" if len(temperatures) > 1 else " at"
    warm = ", ".join(f"{warmth:g}" for warmth in temperatures)
    print(f"{session.many(count, 'sample')}{of_class}{each} temperature {warm}: {out}")
    _tell_npz(options, flow)
    return 0


def draw(
    flow: ImageFlow, count: int, names: list[str] | None, label: int | None, temperature: float, seed: int
) -> Tensor:
    """uint8 images `[count, C, H, W]` on the CPU; of a conditional flow (``names``) one class, or all in turn."""
    device = next(flow.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    how: dict[str, Any] = {
        "temperature": temperature,
        "generator": generator,
        "batch_size": images_at_once(flow.event_shape),
    }
    with captured(flow):
        if names is None:
            return flow.sample(count, **how).cpu()
        labels = torch.arange(count) % len(names) if label is None else torch.full((count,), label)
        return flow.sample(1, labels.to(device), **how)[0].cpu()


# --- interpolate ----------------------------------------------------------------------------------------------------


def interpolate(options: argparse.Namespace) -> int:
    session.set_threads(options.threads)
    device = session.pick_device(options.device)
    flow, folder, config = session.open_run(options.run, device)
    out = _picture(options, folder, "interpolation")
    data, part = _images_to_measure(options, flow, config, options.data)
    first, last, labels = pairs(data, options.pairs, options.seed, conditional=bool(getattr(flow, "classes", None)))
    with session.using(options.run), session.computing(options.precision or session.precision_of(config), device):
        rows = between(flow, first, last, labels, options.steps)
    write_grid(out, rows.flatten(0, 1), grey_levels=flow.grey_levels, columns=options.steps)
    files = [out, *_write_npz(options, rows.flatten(0, 1))]
    if options.json:
        facts = {"data": data.name, "part": part, "rows": len(rows), "images_per_row": options.steps}
        print_json(facts | {"seed": options.seed, "written": files})
        return 0
    print(f"{session.many(len(rows), 'row')} of {options.steps} images, {data.name}, {part}: {out}")
    _tell_npz(options, flow)
    return 0


def pairs(data: ImageData, count: int, seed: int, *, conditional: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Two times `[count]` images at random, no image twice; of a conditional flow both of a pair have one label.

    Raises ``TrainingError`` where there are too few images.
    """
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    waiting: dict[int, int] = {}
    found: list[tuple[int, int]] = []
    for index in order:
        label = int(data.labels[index]) if conditional and data.labels is not None else 0
        if label in waiting:
            found.append((waiting.pop(label), index))
        else:
            waiting[label] = index
        if len(found) == count:
            break
    if len(found) < count:
        same = " of one class" if conditional else ""
        raise TrainingError(f"--pairs {count}: {data.name} has {session.many(len(found), 'pair')} of images{same} only")
    first, last = torch.tensor(found).T
    return data.images[first], data.images[last], data.labels[first] if conditional else None


def between(flow: ImageFlow, first: Tensor, last: Tensor, labels: Tensor | None, steps: int) -> Tensor:
    """Images on the way from ``first [N, C, H, W]`` to ``last``, `[N, steps, C, H, W]` uint8 on the CPU.

    The way is a straight line between the two latents, as in the paper (Kingma & Dhariwal 2018, section 6).
    """
    device = next(flow.parameters()).device
    labels = None if labels is None else labels.to(device)
    few = images_at_once(flow.event_shape)
    with torch.no_grad():
        start, end = (flow.encode(images.to(device), labels, batch_size=few) for images in (first, last))
        # lerp's two ends are exact, so that the outer images are what the flow makes of the two and nothing else.
        shares = torch.linspace(0, 1, steps).tolist()
        images = [flow.decode(torch.lerp(start, end, share), labels, batch_size=few).cpu() for share in shares]
        return torch.stack(images, 1)


# --- evaluate -------------------------------------------------------------------------------------------------------


def evaluate(options: argparse.Namespace) -> int:
    if options.out is not None:
        raise TrainingError(f"--out is for tables, and {options.run} is a flow over images")
    session.set_threads(options.threads)
    device = session.pick_device(options.device)
    flow, _, config = session.open_run(options.run, device)
    data, part = _images_to_measure(options, flow, config, options.data)
    other = None
    if options.against is not None:
        other = _images_to_measure(options, flow, config, options.against, labelled=False)
    precision = options.precision or session.precision_of(config)
    tighter = None
    with session.using(options.run), session.computing(precision, device):
        outcome = measure(flow, data, draws=options.draws, seed=options.seed)
        if options.importance_samples is not None:
            tighter = measure(flow, data, draws=1, importance_samples=options.importance_samples, seed=options.seed)
        largest = round_trip_error(flow, data, seed=options.seed)
        again = reconstruction(flow, data)
        found = examine(flow, *_samples(flow, data), seed=options.seed)
        apart = None if other is None else _told_apart(flow, config, data, *other, seed=options.seed)
    uniform = uniform_bits(flow.grey_levels)
    if options.json:
        facts: dict[str, Any] = {"data": data.name, "part": part, "images": outcome.samples, "draws": outcome.draws}
        facts |= {"precision": precision}
        facts |= {"bits_per_dim": outcome.mean, "standard_error": outcome.standard_error}
        if tighter is not None:
            facts |= {"importance_samples": tighter.importance_samples}
            facts |= {"importance_weighted_bits_per_dim": tighter.mean}
            facts |= {"importance_weighted_standard_error": tighter.standard_error}
        facts |= {"uniform_bits_per_dim": uniform, "round_trip_error": largest}
        facts |= {"reconstructed_images": again.images, "reconstructed_wrong_values": again.wrong}
        facts |= {"reconstructed_largest_grey_levels": again.grey_levels, "reconstructed_largest": again.largest}
        facts |= found.facts()
        for level, told in zip(found.levels, facts.get("levels", ()), strict=True):
            told["bits_per_dim"] = level_bits(flow, level)
        facts |= {} if apart is None else {"against": {"data": apart[0], "auroc": apart[1]}}
        print_json(facts)
        return 0
    print(
        f"{data.name}, {part}, {session.many(outcome.samples, 'image')}, networks in {precision}\n"
        f"  bits per dimension  {outcome.mean:.3f} +- {outcome.standard_error:.3f}   "
        f"(mean of {session.many(outcome.draws, 'dequantisation draw')}; standard error over images)"
    )
    for level in found.levels if len(found.levels) > 1 else ():
        latents = session.many(level.latents, "latent")
        print(f"    of them level {level.number}   {level_bits(flow, level):.3f}   ({latents})")
    if tighter is not None:
        print(
            f"  importance-weighted {tighter.mean:.3f} +- {tighter.standard_error:.3f}   "
            f"(of {session.many(tighter.importance_samples, 'sample')} per image, a tighter bound)"
        )
    off = f", off by {again.grey_levels} at most" if again.wrong else ""
    print(
        f"  uniform             {uniform:.3f}\n"
        f"  round-trip error    {largest:.1e} at most (one grey level is {1 / flow.grey_levels:.1e})\n"
        f"  reconstruction      {again.wrong} of {again.values} pixel values of {session.many(again.images, 'image')} "
        f"differ{off}; {again.largest:.1e} at most before rounding"
    )
    print("\n".join(found.lines()))
    if apart is not None:
        print("\n".join(apart_lines(*apart)))
    return 0


def _samples(flow: ImageFlow, data: ImageData) -> Samples:
    """Images and, where the flow has classes, their labels."""
    samples = as_samples(data, flow)
    return samples.images, samples.labels


def _told_apart(
    flow: ImageFlow, config: dict[str, Any], data: ImageData, other: ImageData, part: str, *, seed: int
) -> tuple[str, dict[str, float]]:
    """What is told apart, and how well by each score. Nobody knows the class of other images: none is given."""
    reference = None
    with contextlib.suppress(DataError, TrainingError):  # the run's own data may be gone: then there is none
        reference = scored((session.run_data(config, may_have_moved=True)[1].images, None))
    inside, outside = scored((data.images, None)), scored((other.images, None))
    found = told_apart(flow, inside, outside, reference, seed=seed)
    return f"{other.name}, {part}, {session.many(len(outside[0]), 'image')} against {len(inside[0])}", found


def _images_to_measure(
    options: argparse.Namespace, flow: ImageFlow, config: dict[str, Any], asked: str | None, *, labelled: bool = True
) -> tuple[ImageData, str]:
    """The run's test part, or what was asked for, and which part of it that is; checked against the flow, with its
    classes where these are needed (``labelled``)."""
    own = (config.get("data") or {}).get("source")
    source = own if asked is None else session.absolute(asked)
    if source is None:
        raise TrainingError(f"{options.run} does not say what data it was trained on: give --data")
    if source == own:
        data, part = session.run_data(config, may_have_moved=True)[2], "test part"
    else:
        depth, height, width = flow.event_shape
        # Of 256 levels, as all sets but the digits have them, those that the flow was trained on.
        bits = flow.grey_levels.bit_length() - 1
        bits = None if source == "digits" or flow.grey_levels == 256 or flow.grey_levels != 2**bits else bits
        found: Any = load_images(source, size=(height, width), channels=depth, bits=bits, stream=False)
        data, part = (found, "all images") if found.test is None else (found.test, "test part")
    if data.grey_levels != flow.grey_levels:
        raise TrainingError(
            f"{data.name} has {data.grey_levels} grey levels and the flow {flow.grey_levels}: bits per dimension "
            "of one mean nothing for the other"
        )
    names = session.class_names(flow, config) if labelled else None
    if names is not None and data.classes is None:
        raise TrainingError(f"{data.name} has no labels, and the flow is conditioned on classes")
    if names is not None and list(data.classes) != names[: len(data.classes)]:
        raise TrainingError(
            f"the classes of {data.name} ({_listed(data.classes)}) are not those of the flow ({_listed(names)}): "
            "expected the same names, in the same order"
        )
    return data, part


# --- small things ---------------------------------------------------------------------------------------------------


def _picture(options: argparse.Namespace, folder: RunFolder | None, name: str) -> Path:
    """Where the picture goes; that it and the .npz can be written is seen now rather than after the work."""
    own = getattr(folder, name) if folder else Path(f"{name}.png")
    out = Path(options.out) if options.out is not None else own
    for file in (out, options.npz and Path(options.npz)):
        if file is not None:
            check_can_be_written(file)
    if out.suffix.lower() != ".png":
        raise TrainingError(f"--out {out}: expected a name that ends in .png")
    return out


def _write_npz(options: argparse.Namespace, images: Tensor) -> list[str]:
    """The file that was asked for, if any."""
    if options.npz is None:
        return []
    numpy = need("numpy", "writing .npz files")
    with atomic_write(options.npz) as temporary, open(temporary, "wb") as opened:
        numpy.savez_compressed(opened, images=images.permute(0, 2, 3, 1).numpy())
    return [options.npz]


def _tell_npz(options: argparse.Namespace, flow: ImageFlow) -> None:
    if options.npz is not None:
        print(f"the same as uint8 [N, H, W, C], 0 to {flow.grey_levels - 1}: {options.npz}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def check_can_be_written(file: Path) -> None:
    if not file.parent.is_dir():
        raise TrainingError(f"{file} cannot be written: there is no folder {file.parent}, make it first")
    if file.is_dir():
        raise TrainingError(f"{file} is a folder: give the name of a file in it")
    if file.exists() and not file.is_file():
        raise TrainingError(f"{file} is a device or a pipe: give the name of a file")
    if not os.access(file.parent, os.W_OK):
        raise TrainingError(f"{file} cannot be written: you may not write in {file.parent}")
