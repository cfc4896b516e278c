"""Does this sample belong to what the flow was trained on? Scores, and how well a score tells two sets apart."""

from __future__ import annotations

import math
import zlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..nn.modes import evaluating
from .levels import level_log_probs, levels_of

if TYPE_CHECKING:
    from ..nn import Flow
    from ..nn.multi_scale import MultiScale

_GROUP = 256  # samples that go through the flow at once, unless told otherwise


def outlier_scores(
    flow: Flow,
    x: Tensor,
    context: Tensor | None = None,
    *,
    reference: Tensor | None = None,
    reference_context: Tensor | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = _GROUP,
) -> dict[str, Tensor]:
    """How little every sample looks like the flow's training data, by several scores: higher is more of an outlier.

    - ``"likelihood"``: ``-log p(x)``. Known to fail: simple images are likely whatever they show (Nalisnick et al.
      2019, Do deep generative models know what they don't know?).
    - ``"typicality"`` (with ``reference``): ``|-log p(x) - H|`` with H the mean of ``-log p`` over the reference: too
      likely is suspicious, too (Nalisnick et al. 2019, Detecting out-of-distribution inputs ... using typicality).
    - ``"complexity"`` (uint8 images): ``-log p(x)`` less the length of the image losslessly compressed, both in bits
      per dimension (Serra et al. 2020, equation 3); see :func:`compressed_bits`.
    - ``"level 1"``, ... (multi-scale flows): minus what each level adds to ``log p(x)``, finest first; see
      :func:`level_log_probs`.

    Args:
        flow: any flow; it is used in evaluation mode.
        x: samples as ``nll`` takes them, ``[N, *event]``: uint8 images of an image flow, rows of a table's flow.
        context: one for each sample, where the flow takes one. Of a flow with ``classes`` it can be left out: then
            ``p(x)`` is the mean over all classes, at the cost of as many forwards, and no level is scored.
        reference, reference_context: data that the flow should know: better held out from training than not.
        generator: of the dequantisation noise (one draw for each sample), on the flow's device.
        batch_size: samples that go through the flow at once.

    Returns:
        Scores by name, each float64 ``[N]`` on the CPU: in bits per dimension for image flows, else in nats.

    Raises ``ValueError`` for no samples, an empty reference, and as the flow does. Cost: one forward (of a multi-scale
    flow two), one more for the reference; five compressions of each image.
    """
    if not len(x):
        raise ValueError("there are no samples to score")
    if reference is not None and not len(reference):
        raise ValueError("reference has no samples")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    own, levels = _losses(
        flow, x, context, generator, batch_size, None if unlabelled(flow, context) else levels_of(flow)
    )
    scores = {"likelihood": own}
    if reference is not None:
        known, _ = _losses(flow, reference, reference_context, generator, batch_size, None)
        scores["typicality"] = (own - known.mean()).abs()
    if x.dtype == torch.uint8:
        scores["complexity"] = own - compressed_bits(x)
    for number, level in enumerate(levels, 1):
        scores[f"level {number}"] = level
    return scores


def _losses(
    flow: Any,
    x: Tensor,
    context: Tensor | None,
    generator: torch.Generator | None,
    batch_size: int,
    levels: MultiScale | None,
) -> tuple[Tensor, list[Tensor]]:
    """``-log p`` of every sample and the levels' parts of it, float64 on the CPU."""
    device = flow._device()
    context = None if context is None else torch.as_tensor(context)
    whole, parts = [], []
    with evaluating(flow):
        for start in range(0, len(x), batch_size):
            rows = slice(start, start + batch_size)
            chunk = x[rows].to(device)
            given = context if context is None or context.dim() == 0 or len(context) == 1 else context[rows]
            given = None if given is None else given.to(device)
            log_q: Tensor | float = 0.0
            if not chunk.is_floating_point() and hasattr(flow, "dequantize_and_log_prob"):
                chunk, log_q = flow.dequantize_and_log_prob(chunk, generator=generator)
            elif getattr(flow, "dequantizes", False):
                chunk = chunk + flow.noise(chunk, generator=generator)
            if levels is not None:
                each = level_log_probs(flow, chunk, given)
                parts.append(each.double().cpu())
                whole.append((each.sum(1) - log_q).double().cpu())
            else:
                whole.append((_log_prob(flow, chunk, given) - log_q).double().cpu())
    found, split = -torch.cat(whole), [-part for part in torch.cat(parts).unbind(1)] if parts else []
    if not hasattr(flow, "bits_per_dim"):
        return found, split
    # What a grey level's width adds is the same for all samples; of the levels each has its share by its latents.
    count, constant = flow.event_shape.numel(), math.log2(flow.grey_levels)
    sizes = [] if levels is None else levels.sizes
    bits = [part / (math.log(2) * count) + constant * size / count for part, size in zip(split, sizes, strict=True)]
    return found / (math.log(2) * count) + constant, bits


def unlabelled(flow: Any, context: Tensor | None) -> bool:
    """Whether the classes that the flow is conditioned on are not given."""
    return context is None and isinstance(getattr(flow, "classes", None), int)


def _log_prob(flow: Any, x: Tensor, context: Tensor | None) -> Tensor:
    if not unlabelled(flow, context):
        return flow.log_prob(x, context)
    labels = [torch.full((len(x),), label, device=x.device) for label in range(flow.classes)]
    each = torch.stack([flow.log_prob(x, label) for label in labels])
    return each.logsumexp(0) - math.log(flow.classes)


# --- complexity -------------------------------------------------------------------------------------------------------


def compressed_bits(images: Tensor) -> Tensor:
    """How long each image is when losslessly compressed: float64 ``[N]``, in bits per dimension.

    What PNG does, without its headers: every pixel less what its neighbours predict, by the best of PNG's five filters
    (one for the whole image), compressed by zlib's deflate at level 9. So it needs no package and is the same anywhere.

    Args:
        images: uint8 ``[N, C, H, W]``.

    Raises ``ValueError`` for anything else. Cost: five compressions of each image, on the CPU. Reference: Serra et al.
    2020, section 3.2; the PNG specification, section 9.
    """
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise ValueError(f"expected uint8 images [N, C, H, W], got {images.dtype} {list(images.shape)}")
    pixels = images.cpu().to(torch.int16)
    padded = torch.nn.functional.pad(pixels, (1, 0, 1, 0))
    left, up, corner = padded[:, :, 1:, :-1], padded[:, :, :-1, 1:], padded[:, :, :-1, :-1]
    predictions = (torch.zeros_like(pixels), left, up, (left + up) // 2, _paeth(left, up, corner))
    sizes = torch.stack([_sizes(pixels - predicted) for predicted in predictions])
    return sizes.amin(0) * 8 / max(1, images[0].numel()) if len(images) else sizes.amin(0)


def _paeth(left: Tensor, up: Tensor, corner: Tensor) -> Tensor:
    """Of the three neighbours the one nearest to ``left + up - corner``; of equals the first."""
    guess = left + up - corner
    by_left, by_up, by_corner = ((guess - v).abs() for v in (left, up, corner))
    return torch.where((by_left <= by_up) & (by_left <= by_corner), left, torch.where(by_up <= by_corner, up, corner))


def _sizes(residuals: Tensor) -> Tensor:
    """Bytes of every image's residuals (modulo 256, channels innermost), compressed."""
    rows = residuals.remainder(256).to(torch.uint8).permute(0, 2, 3, 1).flatten(1)
    return torch.tensor([_deflated(bytes(row.tolist())) for row in rows], dtype=torch.float64)


def _deflated(data: bytes) -> int:
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9)  # raw: no header and no checksum
    return len(packer.compress(data)) + len(packer.flush())


# --- telling apart ----------------------------------------------------------------------------------------------------


def auroc(inside: Tensor, outside: Tensor) -> float:
    """The area under the ROC curve of a score that should be higher for ``outside`` than for ``inside``, both ``[N]``.

    The chance that a random sample from outside scores higher than one from inside, equals counting half: 1 tells the
    two apart always, 0.5 is chance, below it the score points the wrong way. Infinite scores are ordered like others.

    Raises ``ValueError`` for empty or NaN scores. Cost: O(N log N).
    """
    inside, outside = (torch.as_tensor(v).detach().double().cpu().flatten() for v in (inside, outside))
    for name, scores in (("inside", inside), ("outside", outside)):
        if not len(scores):
            raise ValueError(f"there are no scores {name}")
        bad = int(torch.isnan(scores).sum())
        if bad:
            raise ValueError(f"{bad} of {len(scores)} scores {name} are NaN")
    ordered = inside.sort().values
    below = torch.searchsorted(ordered, outside, right=False)
    not_above = torch.searchsorted(ordered, outside, right=True)
    return float((below + not_above).double().mean() / (2 * len(inside)))
