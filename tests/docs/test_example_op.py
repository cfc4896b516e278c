"""The op that the page on adding one makes: its Python runs, its C++ is compiled and computes the same."""

import shutil
import subprocess
import sys

import pages
import pytest

PAGE = pages.DOCS / "adding-an-op.md"

# What the tables that the page names make of its lines, for this kernel alone.
ALONE = """
#include "../csrc/include/cpu_kernels.h"
#include "../csrc/bindings/register.h"
namespace nf {
namespace baseline { void leaky_relu_forward(const LeakyReLUForward&, const Launch&); }
const CpuKernels& cpu_kernels() {
  static CpuKernels table{};
  table.leaky_relu_forward = baseline::leaky_relu_forward;
  return table;
}
void register_leaky_relu(StableLibrary&);
static const bool done = [] {
  static StableLibrary library(StableLibrary::Kind::IMPL, "nfkernels", "CPU", __FILE__, __LINE__);
  register_leaky_relu(library);
  return true;
}();
}  // namespace nf
"""

# Runs below the page's own program.
ON_THE_KERNEL = """
import itertools, sys
assert not torch._C._dispatch_has_kernel_for_dispatch_key("nfkernels::_leaky_relu_forward", "CPU")
torch.ops.load_library(sys.argv[1])
assert torch._C._dispatch_has_kernel_for_dispatch_key("nfkernels::_leaky_relu_forward", "CPU")
shapes = [(3, 5), (2, 3, 4, 5), (0, 4), (2, 0, 3), (1, 2, 30, 20)]
for shape, dtype in itertools.product(shapes, (torch.float32, torch.float64, torch.bfloat16, torch.float16)):
    x = torch.randn(shape).to(dtype)
    sliced = torch.cat([x, x], 1)[:, : shape[1]]
    for given in (x, sliced, x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x):
        y, logdet = leaky_relu(given, 0.3)
        assert y.stride() == torch.empty_like(given).stride()
        torch.testing.assert_close((y, logdet), reference(given, 0.3))
"""


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def compiled(folder):
    """The page's kernel and binding as a module of their own, or None where there is no compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        return None
    from torch.utils.cpp_extension import include_paths, library_paths

    for name in ("include", "cpu", "bindings"):
        shutil.copytree(pages.ROOT / "csrc" / name, folder / "csrc" / name)
    written = []
    for _, lines in pages.blocks(PAGE, "cpp"):
        written.append(folder / lines[0].removeprefix("// "))
        assert not written[-1].exists()
        written[-1].write_text("\n".join(lines) + "\n")
    assert [path.suffix for path in written] == [".h", ".cpp", ".cpp"]
    table, first = folder / "csrc/include/cpu_kernels.h", "KERNEL(channel_affine_forward,"
    text = table.read_text().replace('#include "kernels.h"', '#include "kernels.h"\n#include "leaky_relu.h"')
    assert first in text
    table.write_text(text.replace(first, f"KERNEL(leaky_relu_forward, const LeakyReLUForward&) {first}"))
    (folder / "alone").mkdir()
    (folder / "alone/alone.cpp").write_text(ALONE)
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
    flags += [f"-isystem{path}" for path in include_paths()]
    link = ["-Wl,--no-as-needed", *(f"-L{path}" for path in library_paths()), "-ltorch", "-ltorch_cpu", "-lc10"]
    run(compiler, *flags, *written[1:], folder / "alone/alone.cpp", "-o", folder / "alone.so", *link)
    return folder / "alone.so"


@pytest.mark.slow
def test_the_op_of_the_page_works(tmp_path, monkeypatch):
    """In a process of its own: what it adds to PyTorch stays."""
    ((code, _),) = pages.programs(PAGE)
    module = compiled(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.py").write_text(code + (ON_THE_KERNEL if module else ""))
    run(sys.executable, "page.py", module)


def test_the_page_names_files_that_there_are():
    text = PAGE.read_text()
    for name in ("nfkernels/ops/_library.py", "csrc/include/cpu_kernels.h", "csrc/bindings/register.h", "setup.py"):
        assert name in text
        assert (pages.ROOT / name).is_file()
    for place, table in (("csrc/bindings/register.h", "NF_CPU_OPS"), ("setup.py", "CPU_OPS")):
        assert f"`{table}`" in text
        assert table in (pages.ROOT / place).read_text()
    for kind in ("reference", "ops"):
        assert (pages.ROOT / "nfkernels" / kind / "channel_affine.py").is_file(), "the page's smallest example"
