"""The command line itself: what it refuses, what it tells, and how its process ends."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from command_line import QUICK, refused

for package in ("sklearn", "matplotlib", "PIL", "tqdm"):
    pytest.importorskip(package)

from nfkernels import cli  # noqa: E402
from nfkernels.training import commands  # noqa: E402


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Every command runs in an empty folder, and leaves torch's thread count as it was."""
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "--steps", "0"], "--steps: '0': expected a whole number, at least 1"),
        (["train", "--steps", "many"], "--steps: 'many'"),
        (["train", "--depth", "2,x"], "--depth: '2,x': expected a whole number"),
        (["train", "--lr", "0"], "--lr: '0': expected a number above 0"),
        (["train", "--lr", "nan"], "--lr: 'nan'"),
        (["train", "--dropout", "1"], "--dropout: '1': expected a number of at least 0 and below 1"),
        (["train", "--size", "8x"], "--size: '8x'"),
        (["train", "--device", "gpu"], "--device: 'gpu': expected auto, cpu, cuda"),
        (["train", "--seed", "-1"], "--seed: '-1'"),
        (["train", "--step", "3"], "unrecognized arguments: --step 3"),
        (["train", "--threads", "100000"], "--threads: '100000': expected a whole number, at least 1 and at most"),
        (["train", "--device", "cuda:99999999999999999999"], "--device: 'cuda:9999"),
        (["train", "--size", "99999999999999999999"], "--size: '9999"),
        (["train", "--betas", "0.9"], "--betas: '0.9': expected 2 values with a comma between them"),
        (["train", "--betas", "0.9,1"], "--betas: '0.9,1': expected a number of at least 0 and below 1"),
        (["train", "--lr-end", "1.5"], "--lr-end: '1.5': expected a number of at least 0 and at most 1"),
        (["train", "--preset", "glow"], "--preset: invalid choice: 'glow'"),
        (["train", "--n-bits", "9"], "--n-bits: '9': expected a whole number, at least 1 and at most 8"),
        (["sample", "run", "--temperatures", "0.5,x"], "--temperatures: '0.5,x'"),
        (["sample", "run", "--temperatures", "1", "--temperature", "1"], "not allowed with"),
        (["interpolate", "run", "--steps", "1"], "--steps: '1': expected a whole number, at least 2"),
        (["evaluate", "run", "--importance-samples", "0"], "--importance-samples: '0'"),
        (["train", "--channels", "2"], "--channels: invalid choice: 2"),
        *((["train", option, ""], f"{option}: '': expected a name") for option in ("--data", "--out", "--resume")),
        (["sample", ""], "RUN: ''"),
        (["sample", "run", "--npz", ""], "--npz: ''"),
        (["evaluate", "run", "--data", ""], "--data: ''"),
        (["evaluate", "run", "--steps", "3"], "nfkernels evaluate: unrecognized arguments: --steps 3"),
        (["sample", "run", "--temperature", "1e9"], "--temperature: '1e9'"),
        (["sample", "run", "--count", "-3"], "--count: '-3'"),
        (["sample", "run", "--temperature", "-1"], "--temperature: '-1'"),
        (["sample"], "RUN"),
        (["paint"], "invalid choice: 'paint'"),
        ([], "required: COMMAND"),
    ],
)
def test_a_wrong_command_line_is_status_2(capsys, arguments, sentence):
    error = refused(capsys, *arguments, status=2)
    assert sentence in error
    assert error.rstrip().endswith("--help")


def test_defects_of_the_program_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(commands, "fit", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", *QUICK])


def test_defects_of_the_parser_keep_theirs(monkeypatch):
    monkeypatch.setattr(cli, "parse", lambda argv: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["info"])


# --- info -----------------------------------------------------------------------------------------------------------


def test_info_says_which_kernel_serves_what(capsys):
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    served = {(row["op"], row["device"]): row for row in facts["ops"]}
    for op in ("affine_coupling_forward", "channel_mix_backward"):
        assert served[op, "cpu"]["kernel"] in ("native", "reference")
        assert served[op, "cpu"]["why"]
    assert cli.main(["info"]) == 0
    said = capsys.readouterr().out
    assert "affine_coupling_forward" in said
    assert torch.__version__ in said
    assert ("not here" in said) == (not torch.cuda.is_available())


# --- signals, in a process of its own -------------------------------------------------------------------------------


def start(*arguments):
    command = [sys.executable, "-W", "ignore", "-m", "nfkernels", "train", "--progress", "lines", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    assert process.stderr.readline().startswith("step "), process.communicate()
    return process


def test_ctrl_c_saves_and_leaves_and_the_run_goes_on(capsys):
    small = ["--depth", "1", "--width", "8", "--threads", "1", "--steps", "100000", "--out", "run"]
    process = start(*small)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped by Ctrl-C after " in out
    assert "Traceback" not in err
    step = int(out.split("stopped by Ctrl-C after ")[1].split()[0])
    assert cli.main(["train", "--resume", "run", "--steps", str(step + 1), "--quiet"]) == 0
    assert f"{step + 1} steps, " in capsys.readouterr().out


def test_a_second_ctrl_c_ends_at_once():
    # The step that is under way takes a minute, so that only the second signal can end it.
    code = (
        "import sys, time\n"
        "from nfkernels import cli\n"
        "from nfkernels.training.trainer import Trainer\n"
        "def step(self):\n"
        "    print('step has begun', file=sys.stderr, flush=True)\n"
        "    for _ in range(6000): time.sleep(0.01)\n"
        "Trainer.step = step\n"
        "sys.exit(cli.main(['train', '--depth', '1', '--width', '8', '--quiet', '--out', 'run']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr.readline() == "step has begun\n"
    process.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert process.poll() is None  # the first one waits for the step
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err


def run_python(code, **environment):
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment})


def test_a_closed_pipe_costs_the_output_and_not_the_run():
    command = f"{sys.executable} -W ignore -m nfkernels train {' '.join(QUICK)} --out run 2>&1"
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -1; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done
    assert done.stdout.startswith("data   digits")
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
    assert os.path.exists("run/loss.png")


def test_a_terminal_that_knows_only_ascii():
    code = "import sys; from nfkernels import cli; sys.exit(cli.main(['sample', 'f\\u00fcr']))"
    done = run_python(code, PYTHONIOENCODING="ascii:strict")
    assert done.returncode == 1
    assert done.stderr == "nfkernels sample: f\\xfcr does not exist\n"
    done = run_python(
        "print(1); import sys; from nfkernels import cli; cli.main(['f\\u00fcr'])", PYTHONIOENCODING="ascii"
    )
    assert "Traceback" not in done.stderr


def test_ctrl_c_while_the_command_is_being_imported():
    code = (
        "import importlib, sys\n"
        "from nfkernels import cli\n"
        "def interrupted(*arguments): raise KeyboardInterrupt\n"
        "importlib.import_module = interrupted\n"
        "sys.exit(cli.main(['train']))\n"
    )
    done = run_python(code)
    assert (done.returncode, done.stderr) == (130, "\nstopped\n")


def test_help_needs_no_torch():
    """The parser itself: `nfkernels --help` must not pay for importing torch."""
    code = (
        "import sys, types, importlib.util\n"
        "spec = importlib.util.find_spec('nfkernels')\n"
        "package = types.ModuleType('nfkernels')\n"  # without running nfkernels/__init__.py
        "package.__path__ = list(spec.submodule_search_locations)\n"
        "sys.modules['nfkernels'] = package\n"
        "import nfkernels.cli\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "nfkernels.cli.main(['train', '--help'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--weight-decay" in done.stdout
