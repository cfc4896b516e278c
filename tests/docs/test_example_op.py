"""The C++ of the page on adding an op compiles against the headers that are here."""

import shutil
import subprocess

import pages
import pytest

PAGE = pages.DOCS / "adding-an-op.md"


def test_the_cpp_compiles(tmp_path):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        pytest.skip("no C++ compiler here")
    cpp_extension = pytest.importorskip("torch.utils.cpp_extension")
    for folder in ("include", "cpu", "bindings"):
        shutil.copytree(pages.ROOT / "csrc" / folder, tmp_path / "csrc" / folder)
    written = []
    for _, lines in pages.blocks(PAGE, "cpp"):
        path = tmp_path / lines[0].removeprefix("// ")
        assert not path.exists()
        path.write_text("\n".join(lines) + "\n")
        written.append(path)
    assert [path.suffix for path in written] == [".h", ".cpp", ".cpp"]
    table = tmp_path / "csrc/include/cpu_kernels.h"
    text = table.read_text().replace('#include "kernels.h"', '#include "kernels.h"\n#include "leaky_relu.h"')
    first = "KERNEL(channel_affine_forward,"
    assert first in text
    table.write_text(text.replace(first, f"KERNEL(leaky_relu_forward, const LeakyReLUForward&) {first}"))
    flags = ["-std=c++17", "-fsyntax-only", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
    flags += [*(f"-isystem{path}" for path in cpp_extension.include_paths())]
    for path in written[1:]:
        done = subprocess.run([compiler, *flags, str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
