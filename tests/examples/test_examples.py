"""Every example runs as its docstring says, from another folder, within its time, and its numbers hold."""

import ast
import json
import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}
DRIVE = str(Path(__file__).with_name("drive.py"))
SECONDS = 60  # what is promised for two cores; of CPU time here, as other processes may have the cores
NEEDS = {"images": ["sklearn"], "accelerate_models": ["nflows", "normflows"]}


def docstring(name):
    return ast.get_docstring(ast.parse(EXAMPLES[name].read_text(encoding="utf-8")))


def command(name):
    """What the docstring says to type."""
    found = re.findall(r"^    ((?:python|torchrun) .*)$", docstring(name), re.MULTILINE)
    assert len(found) == 1, found
    return found[0]


def run(name, folder, *arguments, drive=True, **said):
    """``(result, CPU seconds)`` of the printed command in ``folder``, where ``drive`` leaves what main() returned."""
    words = shlex.split(command(name))
    program = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}[words[0]]
    script = words.index(f"examples/{name}.py")
    driver = [DRIVE, "numbers"] if drive else []
    words = [sys.executable, *program, *words[1:script], *driver, str(EXAMPLES[name]), *words[script + 1 :], *arguments]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | said
    before = used()
    result = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=5 * SECONDS)
    return result, used() - before


def used():
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


def written(text):
    return re.findall(r"^wrote (\S+)$", text, re.MULTILINE)


# Of what main() returns: the least and the most that it may be.
BARS = {
    "twenty_lines": {"truth - flow": (-0.02, 0.08), "flow - normal": (0.8, 1.0)},
    "images": {"bits": (1.5, 2.36), "independent - bits": (0.05, 1.0), "shuffled": (0.95, 1), "upside_down": (0.7, 1)},
    "table": {"flow - truth": (-0.02, 0.1), "normal - flow": (1.0, 2.0), "day - night": (5, 100)},
    "simulation_based_inference": {
        "divergence": (0, 0.05),
        "coverage_50": (0.47, 0.53),
        "coverage_80": (0.77, 0.83),
        "coverage_95": (0.92, 0.98),
    },
    "variational_inference": {"truth - elbo": (-0.005, 0.05), "truth - evidence": (-0.05, 0.05)},
    "own_layer": {"sound": (1, 1), "blamed": (1, 1), "difference": (0, 0), "without - flow": (0.3, 10)},
    "accelerate_models": {
        "normflows_fused": (8, 99),
        "nflows_fused": (8, 99),
        "normflows_moved": (0, 1e-4),
        "nflows_moved": (0, 1e-4),
        "truth - flow": (-0.02, 0.12),
        "restored": (8, 99),
    },
    "reversible_training": {
        "growth": (1, 1.01),
        "saved": (100, 1e6),
        "gradient_error": (0, 1e-4),
        "drift": (0, 1e-4),
        "normal - flow": (0.5, 5),
    },
    "two_processes": {"processes": (2, 2), "same_weights": (1, 1), "difference": (0, 1e-5), "loss": (0.8, 1.7)},
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs_as_printed_and_keeps_its_word(name, tmp_path):
    for module in ["matplotlib", "PIL", *NEEDS.get(name, [])]:
        pytest.importorskip(module)
    result, seconds = run(name, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Traceback" not in result.stderr, result.stderr[-3000:]
    assert seconds < SECONDS
    numbers = json.loads((tmp_path / "numbers-0.json").read_text())
    found = {what: eval(what, {}, numbers) for what in BARS[name]}
    wrong = {what: found[what] for what, (least, most) in BARS[name].items() if not least <= found[what] <= most}
    assert not wrong, f"{wrong}\n{result.stdout}"
    # What it says that it wrote is all there is, in the folder of its name, and the docstring names each file.
    files = {path.relative_to(tmp_path).as_posix() for path in (tmp_path / name).iterdir()}
    assert files == set(written(result.stdout))
    assert any(file.endswith(".png") for file in files)
    for file in files:
        assert f"``{Path(file).name}``" in docstring(name)
        if file.endswith(".png"):
            assert_not_blank(tmp_path / file)
    assert len(result.stdout.splitlines()) <= 40


def assert_not_blank(path):
    from PIL import Image

    picture = Image.open(path).convert("L")
    assert min(picture.size) >= 100
    counts = picture.histogram()
    assert sum(count > 0 for count in counts) > 10
    assert max(counts) < 0.99 * picture.width * picture.height


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_options_are_the_same_everywhere(name):
    text = EXAMPLES[name].read_text(encoding="utf-8")
    for option in ("--out", "--seed", "--steps"):
        assert f'add_argument("{option}"' in text
    assert "    if options.steps < 1 or options.out.is_file():\n        parser.error(" in text
    assert text.endswith('\n\nif __name__ == "__main__":\n    main()\n')
    assert len(text.splitlines()) <= 180


def test_what_cannot_be_asked_for_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    for wrong in (["--steps", "0"], ["--out", "file"]):
        result, _ = run("twenty_lines", tmp_path, *wrong, drive=False)
        assert result.returncode == 2
        assert "error: expected --steps of at least 1, and a folder as --out" in result.stderr
        assert "Traceback" not in result.stderr


def test_the_page_lists_every_example_with_its_command():
    page = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    for name in EXAMPLES:
        assert f"[{name}.py]({name}.py)" in page
        assert f"`{command(name)}`" in page


def test_missing_libraries_are_told_in_one_sentence(tmp_path):
    (tmp_path / "normflows.py").write_text('raise ImportError("hidden", name="normflows")')
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    result, _ = run("accelerate_models", tmp_path, drive=False, PYTHONPATH=path)
    assert result.returncode == 1
    assert result.stderr == (
        'normflows is missing: pip install "nfkernels[peers]" brings the libraries of this example\n'
    )
    assert result.stdout == ""
