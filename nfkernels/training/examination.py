"""What `nfkernels evaluate` says beside the likelihood: levels, layers, what is not finite, what tells data apart."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..diagnostics import Condition, auroc, condition_numbers, level_log_probs, outlier_scores
from ..diagnostics.levels import levels_of
from ..nn.modes import evaluating
from .evaluation import images_at_once

if TYPE_CHECKING:
    from ..nn import Flow

WORST = 3  # layers whose condition numbers are told
_THERE_AND_BACK, _DRAWN = 256, 64  # samples that are sent through the flow and back, and that are drawn
# What is told apart at most: images are compressed one by one.
_SCORED, _FEWEST_SCORED, _SCORED_VALUES = 2000, 200, 2**25

Samples = tuple[Tensor, Tensor | None]  # and their contexts


@dataclass(frozen=True)
class Level:
    """``latents`` leave after level ``number``; ``log_likelihood``: what it adds to log p, in nats per sample."""

    number: int
    latents: int
    log_likelihood: float


@dataclass(frozen=True)
class Examination:
    """What :func:`examine` found.

    Args:
        levels: of a multi-scale flow, finest first; of one draw of the dequantisation noise.
        conditions: of the layers, the worst first.
        not_finite: of each kind of value how many were not finite, and how many there were.
    """

    levels: list[Level]
    conditions: list[Condition]
    not_finite: dict[str, tuple[int, int]]

    @property
    def bad(self) -> int:
        return sum(bad for bad, _ in self.not_finite.values())

    @property
    def values(self) -> int:
        return sum(count for _, count in self.not_finite.values())

    def facts(self) -> dict[str, Any]:
        """For ``print_json``."""
        worst = [asdict(condition) for condition in self.conditions[:WORST]]
        share = {name: bad / count if count else 0.0 for name, (bad, count) in self.not_finite.items()}
        facts: dict[str, Any] = {"condition_numbers": worst}
        facts |= {"non_finite_share": self.bad / max(1, self.values), "non_finite_share_of": share}
        return facts | ({"levels": [asdict(level) for level in self.levels]} if self.levels else {})

    def lines(self) -> list[str]:
        """For the terminal: condition numbers and non-finite values."""
        worst = [
            f"{'' if condition.exact else 'at least '}{condition.value:.1e}  {condition.layer} ({condition.kind})"
            for condition in self.conditions[:WORST]
        ] or ["none could be found"]
        lines = [f"  condition numbers   {worst[0]}", *(f"{'':22}{text}" for text in worst[1:])]
        lines[0] += f"   (the worst of {len(self.conditions)} layers)" if len(self.conditions) > WORST else ""
        of = ", ".join(f"{bad} {name}" for name, (bad, _) in self.not_finite.items() if bad)
        of = of or ", ".join(self.not_finite)
        return [*lines, f"  non-finite values   {self.bad / max(1, self.values):.2%} of {self.values} ({of})"]


def examine(flow: Any, samples: Tensor, context: Tensor | None, *, seed: int = 0) -> Examination:
    """Looks a flow over on ``samples`` (uint8 images, or rows with their noise) and their ``context``, on any device.

    Cost: one forward of all samples, a round trip of 256, 64 samples, and :func:`condition_numbers` of two.
    """
    device = flow._device()
    generator = torch.Generator(device).manual_seed(seed)
    size = images_at_once(samples.shape[1:])
    levels = levels_of(flow)
    parts = []
    with evaluating(flow):
        for start in range(0, len(samples), size):
            rows = slice(start, start + size)
            x, given = samples[rows].to(device), None if context is None else context[rows].to(device)
            log_q: Tensor | float = 0.0
            if not x.is_floating_point():
                x, log_q = flow.dequantize_and_log_prob(x, generator=generator)
            if levels is None:
                found = flow._log_prob(x, flow._matched(given, x))[:, None]
            else:
                found = level_log_probs(flow, x, given)
            found[:, 0] -= log_q
            parts.append(found.cpu().double())
        few, given = samples[:_THERE_AND_BACK].to(device), context
        given = None if context is None else context[:_THERE_AND_BACK].to(device)
        z = flow.encode(few, given, batch_size=size)
        decode = getattr(flow, "decode_continuous", flow.decode)
        back = decode(z, given, batch_size=size)
        of = None if given is None else given[torch.arange(_DRAWN) % len(given)]
        if of is None:
            drawn = flow.rsample(_DRAWN, generator=generator, batch_size=size)
        else:
            drawn = flow.rsample(1, of, generator=generator, batch_size=size)
    each = torch.cat(parts)
    named = {"log-likelihoods": each.sum(1), "latents": z, "reconstructions": back, "samples": drawn}
    not_finite = {name: (int((~torch.isfinite(v)).sum()), v.numel()) for name, v in named.items()}
    means = [] if levels is None else zip(levels.sizes, each.mean(0).tolist(), strict=True)
    told = [Level(number, latents, mean) for number, (latents, mean) in enumerate(means, 1)]
    conditions = condition_numbers(flow, few[:2], None if given is None else given[:2])
    # A fixed change of units has a large condition number and loses nothing.
    trained = [c for c in conditions if next(flow.get_submodule(c.layer).parameters(), None) is not None]
    return Examination(told, trained, not_finite)


def level_bits(flow: Any, level: Level) -> float:
    """Of an image flow: what a level adds to the bits per dimension."""
    count = flow.event_shape.numel()
    return (level.latents * math.log2(flow.grey_levels) - level.log_likelihood / math.log(2)) / count


def scored(samples: Samples) -> Samples:
    """The first so many of them."""
    values = max(1, samples[0][:1].numel())
    count = min(_SCORED, max(_FEWEST_SCORED, _SCORED_VALUES // values))
    return samples[0][:count], None if samples[1] is None else samples[1][:count]


def told_apart(
    flow: Flow, inside: Samples, outside: Samples, reference: Samples | None, *, seed: int = 0
) -> dict[str, float]:
    """The area under the ROC curve of every score in :func:`nfkernels.diagnostics.outlier_scores`."""
    known = {} if reference is None else {"reference": reference[0], "reference_context": reference[1]}
    scores = []
    for x, context in (inside, outside):
        generator = torch.Generator(flow._device()).manual_seed(seed)
        size = images_at_once(x.shape[1:])
        scores.append(outlier_scores(flow, x, context, **known, generator=generator, batch_size=size))
    # A sample that has no score is an outlier, whatever it is.
    return {
        name: auroc(*(score[name].nan_to_num(math.inf, math.inf, -math.inf) for score in scores)) for name in scores[0]
    }


_SCORES = {
    "likelihood": "-log p",
    "typicality": "how far -log p is from its mean on the run's validation part",
    "complexity": "-log p less the compressed size",
}


def apart_lines(title: str, found: dict[str, float]) -> list[str]:
    """For the terminal."""
    head = f"{title}, told apart by (area under the ROC curve; 1 always, 0.5 chance, below it the wrong way round)"
    return [head, *(f"  {name:<19} {value:.3f}   {_meaning(name)}".rstrip() for name, value in found.items())]


def _meaning(name: str) -> str:
    return f"({_SCORES[name]})" if name in _SCORES else "(-log p of this level alone)"
