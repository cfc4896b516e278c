"""The committed table of what Triton makes of typical launches, so that a change shows in review."""

import os

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter is on in this process", allow_module_level=True)


@pytest.mark.slow
def test_table_is_up_to_date():
    """Exactly under the Triton that made it; what bounds every version's code is in test_ahead_of_time.py."""
    import resources

    written = resources.TABLE.read_text(encoding="utf-8")
    if f"Triton {triton.__version__};" not in written:
        pytest.skip(f"the table is for another Triton than {triton.__version__}")
    assert resources.table() == written, "run: python tests/triton/resources.py --write, and look at the change"
