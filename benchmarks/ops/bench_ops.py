"""The tables' CPU cases under pytest-benchmark, for its comparisons and histograms, behind the same gate.

python -m pytest benchmarks/ops --benchmark-columns=min,median,rounds --benchmark-sort=name
"""

import pytest
import torch

from benchmarks.case import draw, needs_grad, prepare
from benchmarks.ops import tables
from benchmarks.run import adapted, compiled, compiling, contenders, gate

CPU = torch.device("cpu")
CASES = [(op, case, c) for op in tables() for case in op.cases("cpu") for c in contenders(op, case, CPU)]


@pytest.mark.parametrize(("op", "case", "contender"), CASES, ids=[f"{case.id}-{c.name}" for _, case, c in CASES])
def bench_op(benchmark, op, case, contender):
    benchmark.group = case.id
    (contender,) = compiled([contender])
    entry = gate(op, case, [contender], CPU)[contender.name]
    assert entry["status"] == "gated", entry["reason"]
    with contender.context(needs_grad(case)), compiling(contender, case):
        benchmark(prepare(op, case, contender.run, adapted(draw(op, case, CPU), contender)))
