"""What is measured: architectures and batches, and who takes part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Maker = Literal["nfkernels", "plain", "normflows"]


@dataclass(frozen=True)
class Setup:
    """An architecture with its batch. ``batches``, where given, are tried from the largest until one fits."""

    id: str
    text: str
    shape: tuple[int, int, int]
    levels: int
    steps: int
    hidden: int
    batch: int
    grey_levels: int = 256
    dropout: float = 0.0
    batches: tuple[int, ...] = ()
    whole: bool = True  # whether whole models are compiled for it

    @property
    def checked(self) -> int:
        """Images that go through the gate: a batch, so that what is compiled is compiled once, or two of large ones."""
        return 2 if self.batches else self.batch

    def facts(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Contender:
    """``precision``: where bfloat16 is; everything else is float32. ``compiled``: the mode of ``torch.compile`` for the
    whole model, or ``"steps"`` for each step of flow by itself, in default mode: steps of a level share their code, and
    so it takes seconds where a whole model takes minutes (on a CPU, where C++ is compiled, an hour)."""

    name: str
    maker: Maker
    memory: Literal["stored", "reversible"] = "stored"
    precision: Literal["networks", "everything"] | None = None
    compiled: str | None = None
    graph: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def ours(self) -> bool:
        return self.maker == "nfkernels"


DIGITS = Setup("digits", "the digits quick start: 8x8x1, K = 8, L = 2, width 64, batch 64", (1, 8, 8), 2, 8, 64, 64,
               grey_levels=17, dropout=0.2)  # fmt: skip
CPU = Setup("cpu", "32x32x3, K = 8, L = 3, width 512, batch 16", (3, 32, 32), 3, 8, 512, 16)
CIFAR = Setup("cifar10", "32x32x3, K = 32, L = 3, width 512, batch 64", (3, 32, 32), 3, 32, 512, 64)
LARGE = Setup("256", "256x256x3, K = 32, L = 6, width 512", (3, 256, 256), 6, 32, 512, 32,
              batches=(64, 32, 16, 8, 4, 2, 1), whole=False)  # fmt: skip
QUICK = Setup("quick", "a trial: 8x8x3, K = 2, L = 2, width 8, batch 4", (3, 8, 8), 2, 2, 8, 4)
SETUPS = {"cpu": (DIGITS, CPU), "cuda": (CIFAR, LARGE)}
DEPTHS = (1, 2, 4, 8, 16, 32)

# In order of importance: what a budget does not reach is at the end.
CONTENDERS = (
    Contender("nfkernels", "nfkernels"),
    Contender("plain", "plain"),
    Contender("nfkernels, bf16", "nfkernels", precision="networks"),
    Contender("normflows", "normflows"),
    Contender("nfkernels, reversible", "nfkernels", memory="reversible"),
    Contender("nfkernels, reversible, bf16", "nfkernels", memory="reversible", precision="networks"),
    Contender("nfkernels, graph", "nfkernels", graph=True, devices=("cuda",)),
    Contender("nfkernels, bf16, graph", "nfkernels", precision="networks", graph=True, devices=("cuda",)),
    Contender("nfkernels, reversible, bf16, graph", "nfkernels", memory="reversible", precision="networks", graph=True,
              devices=("cuda",)),
    Contender("plain, bf16 networks", "plain", precision="networks"),
    Contender("plain, bf16", "plain", precision="everything"),
    Contender("plain compiled by steps", "plain", compiled="steps"),
    Contender("plain compiled by steps, bf16 networks", "plain", precision="networks", compiled="steps"),
    Contender("plain compiled", "plain", compiled="default", devices=("cuda",)),
    Contender("plain compiled, bf16 networks", "plain", precision="networks", compiled="default", devices=("cuda",)),
    Contender("plain compiled, reduce-overhead", "plain", compiled="reduce-overhead", devices=("cuda",)),
    Contender("plain compiled, reduce-overhead, bf16 networks", "plain", precision="networks",
              compiled="reduce-overhead", devices=("cuda",)),
)  # fmt: skip


def taking_part(device: str, names: Sequence[str] = (), *, compiled: bool = True) -> list[Contender]:
    """Those for a device; of ``names`` only these. ``ValueError`` for a name that there is not."""
    unknown = set(names) - {c.name for c in CONTENDERS}
    if unknown:
        known = ", ".join(repr(c.name) for c in CONTENDERS)
        raise ValueError(f"there is no contender {', '.join(map(repr, sorted(unknown)))}; there are {known}")
    found = [c for c in CONTENDERS if device in c.devices and (not names or c.name in names)]
    return [c for c in found if compiled or c.compiled is None]
