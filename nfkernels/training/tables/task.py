"""`nfkernels train` on a table: what is particular to it. The functions are those of ``image_task``."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ... import __version__, plot
from ...nn import TableFlow
from .. import session
from ..distributed import Ranks
from ..errors import TrainingError
from ..image_task import refuse_changes, written
from ..loop import FitResult
from ..options import TRAIN, foreign
from ..progress import Reporter, unread_is_fine
from ..run_folder import RunFolder
from . import model
from .board import TableBoard
from .columns import Table, load_table
from .draw import corner_rows
from .kind import MODELS
from .report import Report, conditions, report

needs = {"matplotlib": "the loss curve and the corner plot", "sklearn": "the mixture that a flow is compared with"}
unit = "rows"

_SAME = ("columns", "context", "circular", "header", "missing")
_OPTION = {"hidden": "width"}  # fields of a description by option, where the names differ


def new_run(options: argparse.Namespace) -> tuple[dict[str, Any], Table]:
    wrong = foreign(options, "tables")
    if wrong:
        instead = {"--classes": ": give --context with the column of the class"}.get(wrong[0], "")
        raise TrainingError(f"{wrong[0]} is for images, and {options.data} is a table{instead}")
    if options.data is None:
        raise TrainingError(f"--model {options.model} is for tables: give --data with a .csv, .npy or .parquet file")
    _refuse_useless(options, options.model or "nsf")
    data = {
        "kind": "table",
        "source": session.absolute(options.data),
        "columns": None if options.columns is None else list(options.columns),
        "context": list(options.context or ()),
        "circular": list(options.circular or ()),
        "header": options.header,
        "missing": options.missing or TRAIN["missing"].default,
        "split_seed": session.SPLIT_SEED,
    }
    table = load(data)
    data |= {"name": table.name, "rows": [len(part) for part in (table.train, table.validation, table.test)]}
    asked = {field: _asked(options, field) for field in model.FIELDS}
    angles = [at for at, column in enumerate(table.data) if column.period is not None]
    described = model.describe(options.model or "nsf", len(table.data), len(table.conditions), asked, angles)
    described["columns"] = [column.facts() for column in table.columns]
    session.set_threads(options.threads)
    versions = {"nfkernels": __version__, "torch": torch.__version__}
    return {**versions, "threads": torch.get_num_threads(), "data": data, "model": described}, table


def old_run(options: argparse.Namespace, config: dict[str, Any], folder: RunFolder) -> tuple[dict[str, Any], Table]:
    """The configuration and data of a run to resume; an option that would make it another run is refused."""
    wrong = foreign(options, "tables")
    if wrong:
        raise TrainingError(f"{wrong[0]} is for images, and {folder.path} is a run on a table")
    data, described = config["data"], config["model"]
    missing = {"kind", "features", "columns"} - described.keys()
    if missing:
        raise TrainingError(f"{folder.checkpoint} is damaged: its configuration has no {', '.join(sorted(missing))}")
    _refuse_useless(options, described["kind"])
    asked = {f"--{name}": (getattr(options, name), data.get(name)) for name in _SAME}
    asked["--model"] = (options.model, described["kind"])
    for field in model.FIELDS:
        wish = getattr(options, _OPTION.get(field, field))
        asked[TRAIN[_OPTION.get(field, field)].flag] = (wish, described.get(field, _asked(options, field)))
    refuse_changes(asked)
    if options.data is not None:  # the data may have moved; the checkpoint knows whether it is the same
        data = {**data, "source": session.absolute(options.data)}
    elif not Path(data.get("source", "")).exists():
        raise TrainingError(f"the run's data, {data['source']}, is not there any more: if it moved, give --data PATH")
    session.set_threads(options.threads or config.get("threads"))
    return {**config, "data": data}, load(data)


def load(data: dict[str, Any]) -> Table:
    """The table that a run's configuration describes. ``TrainingError`` where it does not, or the file is gone."""
    try:
        how = {name: data[name] for name in (*_SAME, "split_seed")}
        source = data["source"]
    except KeyError as error:
        raise TrainingError(f"the run's configuration does not say what data it used ({error})") from error
    return load_table(source, seed=how.pop("split_seed"), **how)


def _asked(options: argparse.Namespace, field: str) -> Any:
    option = TRAIN[_OPTION.get(field, field)]
    given = getattr(options, option.name)
    default = option.default if option.table is None else option.table
    return default if given is None else given


def _refuse_useless(options: argparse.Namespace, kind: str) -> None:
    """An option that this kind of flow has no use for, unless it asks for what it is anyway."""
    for field in model.FIELDS:
        option = TRAIN[_OPTION.get(field, field)]
        wish = getattr(options, option.name)
        if wish not in (None, option.default) and not model.takes(kind, field):
            others = ", ".join(other for other in MODELS if model.takes(other, field))
            raise TrainingError(f"{option.flag} {wish} is for --model {others}: {kind} has no use for it")


def count(table: Table) -> int:
    return len(table.train)


def name(table: Table) -> str:
    return table.name


def build(config: dict[str, Any]) -> TableFlow:
    described = dict(config["model"])
    columns = described.pop("columns")
    return model.build(described, columns)


def samples(table: Table) -> tuple[Any, Any]:
    """What ``fit`` trains on and validates with."""
    return table.train.samples(), table.validation.samples()


def board(folder: RunFolder, device: torch.device, progress: Reporter, table: Table) -> TableBoard:
    return TableBoard(folder, device, progress, table)


def print_head(
    config: dict[str, Any], table: Table, flow: TableFlow, device: torch.device, folder: RunFolder, ranks: Ranks
) -> None:
    parameters = sum(p.numel() for p in flow.parameters())
    threads = f", {session.many(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else ""
    threads += f", in {ranks.world} processes" if ranks.world > 1 else ""
    given = f", given {_some(flow.context_names)}" if flow.context_names else ""
    kinds = "" if table.named else ", the file has no names"
    print(
        f"data   {table.name}: {len(table.train)} rows to train on, {len(table.validation)} for validation, "
        f"{len(table.test)} for the test ({session.many(len(flow.names), 'column')}: {_some(flow.names)}{given}{kinds})"
    )
    for note in table.notes:
        print(f"note   {note}")
    print(
        f"model  {model.title(config['model'])}; {parameters:,} parameters, on {device}{threads}\n"
        f"run    {folder.path} (Ctrl-C saves and stops)",
        flush=True,
    )


def finish(
    config: dict[str, Any],
    table: Table,
    flow: TableFlow,
    result: FitResult,
    folder: RunFolder,
    device: torch.device,
    duration: Callable[[], str] | None,
) -> dict[str, Any]:
    """The test, the pictures and what there is to say at the end; nothing is printed without ``duration``."""
    with session.using(folder.path), session.computing(session.precision_of(folder.read_config()), device):
        outcome = report(flow, table)
        drawn = corner_rows(flow, table)
    folder.log({"step": result.step, **outcome.facts()})
    score = f"-log p = {outcome.flow.nats:.3f} nats per row on the test part"
    curve = plot.training_curve(
        result.history,
        unit="nats per row, in data units",
        baselines={rival.name: rival.nats for rival in (outcome.mixture, outcome.gaussian)},
        best=None if result.best is None else (result.best_step, result.best),
        title=f"{table.name}: {score}",
    )
    plot.save(curve, folder.loss)
    corner = plot.corner(**drawn, title=f"{table.name}, {config['model']['kind']}: {score}")
    plot.save(corner, folder.corner)
    if duration is not None:
        with unread_is_fine(sys.stdout):
            _print_result(result, outcome, flow, folder, duration())
    return {**outcome.facts(), "test_rows": outcome.rows, "written": written(folder, folder.corner)}


def _print_result(result: FitResult, outcome: Report, flow: TableFlow, folder: RunFolder, duration: str) -> None:
    early = " (stopped early: validation got no better)" if result.stopped == "early" else ""
    print(f"\n{session.many(result.step, 'step')}{early}, {duration}", end="")
    if result.best is not None:
        print(f"; best validation {result.best:.3f} at step {result.best_step}, last {result.validation:.3f}", end="")
    for sentence in result.warnings:
        print(f"\nwarning: {sentence}", end="")
    scores = (outcome.flow, outcome.mixture, outcome.gaussian)
    width = max(len(score.name) for score in scores)
    drawn = f", mean of {outcome.draws} draws of the noise on whole numbers" if outcome.draws > 1 else ""
    print(
        f"\n\nnegative log-likelihood of {session.many(outcome.rows, 'test row')}, lower is better{drawn}\n"
        f"  {'':<{width}}     in data units                of standardised columns\n"
        f"  {'':<{width}}     nats per row     bits/dim     nats per row     bits/dim"
    )
    for score in scores:
        print(
            f"  {score.name:<{width}}  {score.nats:>8.3f} +- {score.error:<7.3f} {score.bits:>6.3f}  "
            f"{score.standardized:>8.3f} +- {score.error:<7.3f} {score.standardized_bits:>6.3f}"
        )
    for rival in (outcome.mixture, outcome.gaussian):
        lead, error = outcome.leads[rival.name]
        better = "better" if lead >= 0 else "worse"
        print(f"  the flow is {abs(lead):.3f} +- {error:.3f} nats per row {better} than the {rival.name}")
    if outcome.fitted_on < outcome.train_rows:
        print(f"  (the mixture was fitted on {outcome.fitted_on} of {outcome.train_rows} training rows)")
    given = ",".join(f"{column['name']}={_middle(column)}" for column in conditions(flow))
    given = f" --context {given}" if given else ""
    print(
        f"\nin {folder.path}: {', '.join(file.name for file in written(folder, folder.corner))}\n"
        f"\nnext\n"
        f"  nfkernels sample {folder.path} --count 1000 --out samples.csv{given}\n"
        f"  nfkernels evaluate {folder.path}",
        flush=True,
    )


def _middle(column: dict[str, Any]) -> str:
    """A column's mean with digits enough to lie in the middle of its values."""
    far = abs(column["shift"]) / column["scale"]
    return format(column["shift"], f".{max(4, 3 + math.ceil(math.log10(max(far, 1))))}g")


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f", ... ({len(names) - 8} more)" if len(names) > 8 else "")
