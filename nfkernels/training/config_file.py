"""``--config FILE``: options of ``nfkernels train`` from YAML or JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._nearest import did_you_mean, did_you_mean_path
from .errors import TrainingError
from .option import Option

_LARGEST = 2**20  # bytes: a file of options is small, a model given by mistake is not


def read_config(path: str | os.PathLike[str], table: Mapping[str, Option]) -> dict[str, Any]:
    """The options that a file gives, by name, each with its value checked.

    Names are those of the command line, with dashes or underscores. ``.json`` is read as JSON, anything else as YAML
    (by PyYAML's safe loader, which makes nothing but plain values).

    Raises:
        TrainingError: the file is missing, damaged or no table of options; an unknown option, or a value that it cannot
            take: one sentence with the file and the option.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _LARGEST:
            raise TrainingError(
                f"--config {path}: expected a small YAML or JSON file of options, this has more than 1 MB"
            )
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        near = did_you_mean_path(path, before=", ") if isinstance(error, FileNotFoundError) else ""
        raise TrainingError(f"--config {path}: {error.strerror}{near}") from error
    except UnicodeDecodeError as error:
        raise TrainingError(f"--config {path}: expected a YAML or JSON file of options, this is no text") from error
    content = _json(path, text) if path.suffix.lower() == ".json" else _yaml(path, text)
    if content is None:  # an empty file, or one of comments
        return {}
    if not isinstance(content, dict):
        raise TrainingError(f"--config {path}: expected options such as steps: 1000, found a {type(content).__name__}")
    if {"model", "recipe"} <= content.keys():
        raise TrainingError(
            f"--config {path} describes a finished run: give --resume with its folder, or a file that "
            "`nfkernels train --print-config` printed"
        )
    options: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            raise TrainingError(
                f"--config {path}: options are not nested: give those below {key} beside each other, at the top"
            )
        option = _option(path, key, table)
        if option.name in options:
            raise TrainingError(f"--config {path}: {option.name} is there twice, with dashes and with underscores")
        try:
            options[option.name] = option.read(value)
        except ValueError as error:
            shown = "null" if value is None else repr(value)
            raise TrainingError(f"--config {path}: {key} is {shown}: {error}") from None
    return options


def _option(path: Path, key: Any, table: Mapping[str, Option]) -> Option:
    if key is True or key is False:  # YAML 1.1 reads a bare on, off, yes and no so
        raise TrainingError(f"--config {path}: {key} is no option: put names such as 'on' in quotes")
    known = {option.name: option for option in table.values() if option.file}
    word = str(key).replace("-", "_")
    if word in known:
        return known[word]
    if word in table:
        raise TrainingError(f"--config {path}: {key} can only be given on the command line")
    hint = did_you_mean(word, known) or "see nfkernels train --help"
    raise TrainingError(f"--config {path}: there is no option {key!r}: {hint}")


def _json(path: Path, text: str) -> Any:
    def single(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _refuse_twice(path, [key for key, _ in pairs])
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=single)
    except (ValueError, RecursionError) as error:
        raise TrainingError(f"--config {path} is no JSON: {error}") from error


def _yaml(path: Path, text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise TrainingError(
            f'--config {path}: YAML needs PyYAML, which is missing: pip install "nfkernels[train]", or write JSON into '
            "a file that ends in .json"
        ) from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if isinstance(node, yaml.MappingNode):
            _refuse_twice(path, [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        raise TrainingError(f"--config {path} is no YAML: {' '.join(str(error).split())}") from error


def _refuse_twice(path: Path, keys: list[str]) -> None:
    """Both readers would silently take the last one."""
    twice = next((key for at, key in enumerate(keys) if key in keys[:at]), None)
    if twice is not None:
        raise TrainingError(f"--config {path}: {twice} is there twice")
