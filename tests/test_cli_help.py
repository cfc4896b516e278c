"""What ``--help`` shows: every example in it is a command line that there is."""

import re
import shlex

import pytest

import nfkernels
from nfkernels import cli
from nfkernels.cli.commands import COMMANDS, EXAMPLES

LINES = [(name, line) for name, command in COMMANDS.items() for _, line in command.examples]
LINES += [(None, line) for _, line in EXAMPLES]


def words(line):
    """What the shell would hand to ``nfkernels``."""
    return shlex.split(re.search(r"\bnfkernels ([^|>)]*)", line)[1])


def shown(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(("name", "line"), LINES)
def test_every_example_is_understood(name, line):
    options, unknown = cli.build_parser().parse_known_args(words(line))
    assert unknown == []
    assert options.command == (name or options.command)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_its_examples(capsys, name):
    assert len(COMMANDS[name].examples) >= 2
    text = shown(capsys, name)
    for what, line in COMMANDS[name].examples:
        assert f"\n  {line}\n" in text
        assert what.split()[0] in text


def test_help_begins_with_the_commands_and_fits_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    text = shown(capsys)
    assert all(f"\n    {name}" in text for name in COMMANDS)
    assert text.index("demo moons") < text.index("sample runs/digits-1")
    text = shown(capsys, "train")
    assert text.startswith("usage: nfkernels train [options]\n\nTrain a flow on images or a table; writes")
    notes = text[text.index("The defaults suit") : text.index("examples:")]
    assert max(map(len, notes.splitlines())) <= 60
    assert "\x1b" not in text
    assert shown(capsys, "sample").startswith("usage: nfkernels sample RUN [options]\n")


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"nfkernels {nfkernels.__version__}\n"
