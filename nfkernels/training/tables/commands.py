"""`nfkernels sample | evaluate | interpolate` of a flow over a table."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
from pathlib import Path
from typing import Any

import numpy
import torch

from ...nn import TableFlow
from ...nn.modes import evaluating
from .. import session
from ..as_json import print_json
from ..data.image_data import DataError
from ..data.table import read_table
from ..errors import TrainingError
from ..evaluation import mean_and_error
from ..examination import Samples, apart_lines, examine, scored, told_apart
from ..finished import check_can_be_written
from . import task
from .columns import Rows, complete, is_far, wrapped
from .draw import draw, whole_rows
from .report import Score, log_scale_of, modelled, nats_per_row, noisy
from .write import check_out, write_table

_TAKE_OUT = "take these rows out"
_COUNT = 1000  # samples that are drawn by default


# --- sample ---------------------------------------------------------------------------------------------------------


def sample(options: argparse.Namespace) -> int:
    _refuse(options, {"--class": options.label, "--temperatures": options.temperatures, "--npz": options.npz})
    flow, folder, config, device = _opened(options)
    own = folder.path / "samples.csv" if folder else Path("samples.csv")
    out = check_out(own if options.out is None else options.out)
    check_can_be_written(out)
    context = _context(options, flow)
    each = options.count or (_COUNT if context is None or len(context) == 1 else 1)
    if context is not None:
        context = context.repeat(each, 0)
    count = each if context is None else len(context)
    with session.using(options.run), session.computing(options.precision or session.precision_of(config), device):
        given = None if context is None else torch.from_numpy(context).to(_dtype(flow.columns))
        values = draw(flow, count, given, temperature=options.temperature, seed=options.seed)
    rows = whole_rows(flow, values, context)
    write_table(out, _typed(flow, rows), {column["name"]: _digits(column) for column in modelled(flow)})
    if options.json:
        facts = {"rows": count, "columns": list(rows), "temperature": options.temperature, "seed": options.seed}
        print_json(facts | {"written": [out]})
        return 0
    names = f" (columns {', '.join(rows)})" if out.suffix.lower() == ".npy" else ""
    print(f"{session.many(count, 'sample')} at temperature {options.temperature:g}: {out}{names}")
    return 0


def _context(options: argparse.Namespace, flow: TableFlow) -> numpy.ndarray | None:
    """float64 `[M, C]`: what ``--context`` says, a row for each condition; None of a flow without any."""
    names, given = flow.context_names, options.context
    if not names:
        if given is not None:
            raise TrainingError(f"--context {given}: the flow of {options.run} has no context columns, leave it out")
        return None
    example = ",".join(f"{name}=..." for name in names)
    if given is None:
        raise TrainingError(
            f"the flow of {options.run} is conditioned on {', '.join(names)}: give --context {example}, or a file with "
            f"{'this column' if len(names) == 1 else 'these columns'}"
        )
    if os.path.isfile(given):  # of many conditions, which make too long a name for a file, Path would raise
        raw = read_table(given, columns=names)
        return complete(given, raw, "refuse", infinite_advice=_TAKE_OUT, missing_advice=_TAKE_OUT)[0]
    values: dict[str, float] = {}
    for part in given.split(","):
        name, equals, number = (word.strip() for word in part.rpartition("="))
        if not equals:
            raise TrainingError(f"--context {given}: expected {example}, or a file (which is not there)")
        if name in values:
            raise TrainingError(f"--context {given}: {name} is there twice")
        if name not in names:
            raise TrainingError(f"--context {name}: the flow of {options.run} is conditioned on {', '.join(names)}")
        try:
            values[name] = float(number)
        except ValueError:
            values[name] = math.nan
        if not math.isfinite(values[name]):
            raise TrainingError(f"--context {name}={number}: expected a number")
    lacking = [name for name in names if name not in values]
    if lacking:
        raise TrainingError(f"--context {given} does not say what {', '.join(lacking)} is: expected {example}")
    return numpy.array([[values[name] for name in names]])


def _typed(flow: TableFlow, rows: dict[str, numpy.ndarray]) -> dict[str, numpy.ndarray]:
    """Whole numbers as such."""
    return {column["name"]: _whole(column, rows[column["name"]]) for column in flow.columns}


def _whole(column: dict[str, Any], values: numpy.ndarray) -> numpy.ndarray:
    small = bool((numpy.abs(values) < 2**53).all())
    is_whole = column["kind"] == "integer" or (column["kind"] == "constant" and float(column["value"]).is_integer())
    return values.astype(numpy.int64) if is_whole and small else values


def _digits(column: dict[str, Any]) -> int:
    """Seven of the column's spread, which is what a float32 flow computes with."""
    return 7 + max(0, math.ceil(math.log10(max(abs(column["shift"]) / column["scale"], 1))))


# --- evaluate -------------------------------------------------------------------------------------------------------


def evaluate(options: argparse.Namespace) -> int:
    _refuse(options, {"--importance-samples": options.importance_samples})
    flow, _, config, device = _opened(options)
    out = None if options.out is None else check_out(options.out)
    if out is not None:
        check_can_be_written(out)
    name, part, rows, notes = _rows_to_measure(options, flow, config, options.data)
    other = None if options.against is None else _rows_to_measure(options, flow, config, options.against)
    precision = options.precision or session.precision_of(config)
    with session.using(options.run), session.computing(precision, device):
        nats = nats_per_row(flow, rows, draws=options.draws, seed=options.seed)
        error = _round_trip_error(flow, rows, options.seed)
        found = examine(flow, *_samples(flow, rows, options.seed), seed=options.seed)
        apart = None if other is None else _told_apart(flow, config, rows, *other[:3], seed=options.seed)
    score = Score("this flow", *mean_and_error(-nats), log_scale_of(flow), len(flow.names))
    draws = options.draws if flow.dequantizes else 1
    if out is not None:
        order = rows.index.argsort()
        write_table(out, {"row": (rows.index[order] + 1).numpy(), "log_prob": nats[order].numpy()})
    if options.json:
        facts: dict[str, Any] = {"data": name, "part": part, "rows": len(rows), "draws": draws, "precision": precision}
        facts |= {"nll": score.nats, "standard_error": score.error, "bits_per_dim": score.bits}
        facts |= {"nll_standardized": score.standardized, "bits_per_dim_standardized": score.standardized_bits}
        facts |= {"round_trip_error": error} | found.facts()
        facts |= {} if apart is None else {"against": {"data": apart[0], "auroc": apart[1]}}
        print_json(facts | {"notes": notes, "written": [] if out is None else [out]})
        return 0
    print(f"{name}, {part}, {session.many(len(rows), 'row')}, networks in {precision}")
    for note in notes:
        print(f"  note: {note}")
    drawn = f"; mean of {session.many(draws, 'draw')} of the noise on whole numbers" if flow.dequantizes else ""
    print(
        f"  nats per row        {score.nats:.3f} +- {score.error:.3f}   (negative log-likelihood in data units; "
        f"standard error over rows{drawn})\n"
        f"  bits per dimension  {score.bits:.3f}\n"
        f"  standardised        {score.standardized:.3f} nats per row, {score.standardized_bits:.3f} bits per "
        f"dimension, of columns with mean 0 and standard deviation 1\n"
        f"  round-trip error    {error:.1e} standard deviations at most"
    )
    print("\n".join(found.lines()))
    if apart is not None:
        print("\n".join(apart_lines(*apart)))
    if out is not None:
        print(f"the log-density of each row, in nats, higher is more likely: {out}")
    return 0


def _rows_to_measure(
    options: argparse.Namespace, flow: TableFlow, config: dict[str, Any], asked: str | None
) -> tuple[str, str, Rows, list[str]]:
    """The run's test part, or all rows of what was asked for."""
    data = config.get("data") or {}
    own = data.get("source")
    source = own if asked is None else session.absolute(asked)
    if source is None:
        raise TrainingError(f"{options.run} does not say what data it was trained on: give --data")
    if source == own:
        if not Path(source).exists():
            raise TrainingError(f"the run's data, {source}, is not there any more: if it moved, give --data PATH")
        table = task.load(data)
        return table.name, "test part", table.test, []
    names = [column["name"] for column in flow.columns if column["kind"] != "constant"]
    raw = read_table(source, columns=names)
    drop = "give --missing drop to leave these rows out"
    values, notes = complete(source, raw, options.missing, infinite_advice=_TAKE_OUT, missing_advice=drop)
    kept = torch.from_numpy(numpy.flatnonzero(~numpy.isnan(raw.values).any(1)))
    columns = [next(column for column in flow.columns if column["name"] == name) for name in raw.names]
    for at, column in enumerate(columns):
        if column["kind"] == "integer" and (values[:, at] != numpy.floor(values[:, at])).any():
            notes.append(f"{column['name']} is not whole in all rows, as it was where the flow was trained")
        if "period" in column:
            values[:, at] = wrapped(values[:, at], column["shift"] - column["period"] / 2, column["period"])
    parts = []
    for context in (False, True):
        places = [at for at, column in enumerate(columns) if column["context"] == context]
        parts.append(torch.from_numpy(values[:, places]).to(_dtype(columns)))
    if not len(values):
        raise TrainingError(f"{source} has no row without missing values")
    return raw.name, "all rows", Rows(parts[0], parts[1] if flow.context_names else None, kept), notes


def _samples(flow: TableFlow, rows: Rows, seed: int) -> Samples:
    """Rows with noise on whole numbers, and their context."""
    return noisy(flow, rows, seed), rows.context


def _told_apart(
    flow: TableFlow, config: dict[str, Any], rows: Rows, name: str, part: str, other: Rows, *, seed: int
) -> tuple[str, dict[str, float]]:
    """What is told apart, and how well by each score."""
    reference = None
    with contextlib.suppress(DataError, TrainingError):  # the run's own data may be gone: then there is none
        held = task.load(config.get("data") or {}).validation
        reference = scored((held.values, held.context))
    inside, outside = (scored((part.values, part.context)) for part in (rows, other))
    found = told_apart(flow, inside, outside, reference, seed=seed)
    return f"{name}, {part}, {session.many(len(outside[0]), 'row')} against {len(inside[0])}", found


def _round_trip_error(flow: TableFlow, rows: Rows, seed: int) -> float:
    """Of 4,096 rows at most, data to latent and back, in standard deviations."""
    few = Rows(rows.values[:4096], None if rows.context is None else rows.context[:4096], rows.index[:4096])
    device = flow.steps.device
    x = noisy(flow, few, seed).to(device)
    context = None if few.context is None else few.context.to(device)
    with evaluating(flow):
        back = flow.decode(flow.encode(x, context), context)
    scale = torch.tensor([column["scale"] for column in modelled(flow)], dtype=torch.float64)
    return float(((back - x).to("cpu", torch.float64) / scale).abs().max())


# --- small things ---------------------------------------------------------------------------------------------------


def interpolate(options: argparse.Namespace) -> int:
    raise TrainingError(f"interpolate draws images between two images, and {options.run} is a flow over a table")


def _opened(options: argparse.Namespace) -> tuple[TableFlow, Any, dict[str, Any], torch.device]:
    session.set_threads(options.threads)
    device = session.pick_device(options.device)
    flow, folder, config = session.open_run(options.run, device, TableFlow)
    return flow, folder, config, device


def _dtype(columns: list[dict[str, Any]]) -> torch.dtype:
    return torch.float64 if is_far(columns) else torch.float32


def _refuse(options: argparse.Namespace, given: dict[str, Any]) -> None:
    for flag, value in given.items():
        if value is not None:
            raise TrainingError(f"{flag} is for images, and {options.run} is a flow over a table")
