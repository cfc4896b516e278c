"""The TAB key: the parser's answers in this process, and once through a real shell."""

import io
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import refused

from nfkernels import cli
from nfkernels.training.options import TRAIN
from nfkernels.training.presets import PRESETS

argcomplete = pytest.importorskip("argcomplete")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def _no_descriptor(*args):
    raise OSError("not the shell's")


@pytest.fixture
def complete(monkeypatch):
    def complete(line):
        """What may stand in the place of the line's last word."""
        for name, value in {
            "_ARGCOMPLETE": "1",
            "COMP_LINE": line,
            "COMP_POINT": str(len(line)),
            "_ARGCOMPLETE_IFS": "\n",
        }.items():
            monkeypatch.setenv(name, value)
        output = io.StringIO()
        with (
            monkeypatch.context() as patch
        ):  # it takes descriptor 9 for its own, and closes it: here it may be pytest's
            patch.setattr(argcomplete.finders.os, "fdopen", _no_descriptor)
            argcomplete.autocomplete(cli.build_parser(), exit_method=lambda status: None, output_stream=output)
        return {word.strip() for word in output.getvalue().split("\n") if word}

    return complete


def test_commands_options_choices_and_runs(complete):
    assert complete("nfkernels ") >= {"train", "sample", "interpolate", "evaluate", "demo", "info", "completion"}
    assert complete("nfkernels tr") == {"train"}
    assert complete("nfkernels train --ba") == {"--batch-size"}
    assert {option.flag for option in TRAIN.values()} <= complete("nfkernels train --")
    assert complete("nfkernels train --preset ") == set(PRESETS)
    assert complete("nfkernels evaluate runs/x --precision b") == {"bfloat16"}
    assert complete("nfkernels demo ch") == {"checkerboard", "change-of-variables"}
    for name in ("digits-1", "digits-2"):
        Path("runs", name).mkdir(parents=True)
        Path("runs", name, "model.safetensors").touch()
    Path("runs/empty").mkdir()
    for command in ("sample", "interpolate", "evaluate"):
        assert complete(f"nfkernels {command} runs/") == {"runs/digits-1", "runs/digits-2"}
    assert complete("nfkernels sample runs/digits-2") == {"runs/digits-2"}


@pytest.mark.parametrize(
    ("shell", "part"), [("bash", "complete "), ("zsh", "compdef"), ("fish", "complete --command nfkernels")]
)
def test_the_script_of_every_shell(capsys, shell, part):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert part in script
    if shutil.which(shell):
        checked = subprocess.run([shell, "-n"], input=script, capture_output=True, text=True)
        assert (checked.returncode, checked.stderr) == (0, "")


def test_bash_completes(tmp_path):
    """As somebody does who has the line in ~/.bashrc: bash itself calls what the script registers."""
    bash = shutil.which("bash") or pytest.skip("no bash here")
    command = tmp_path / "bin" / "nfkernels"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m nfkernels "$@"\n')
    command.chmod(0o755)
    script = """
        eval "$(nfkernels completion bash)"
        ask() {
            COMP_LINE="$*" COMP_POINT=${#COMP_LINE} COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_TYPE=9 COMPREPLY=()
            registered=$(complete -p nfkernels); registered=${registered##*-F }
            ${registered%% *} nfkernels "${@: -1}" "${@: -2:1}" 2>/dev/null
            echo "${COMPREPLY[*]}"
        }
        ask nfkernels train --batch
        ask nfkernels train --schedule c
    """
    environment = {**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}"}
    done = subprocess.run([bash, "--norc", "-c", script], capture_output=True, text=True, timeout=60, env=environment)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines == [["--batch-size"], ["cosine", "constant"]], done


def test_without_argcomplete_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    assert 'argcomplete, which is missing: pip install "nfkernels[completion]"' in refused(capsys, "completion", "bash")
