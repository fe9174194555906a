"""The live self-test of IBGDA, as of a network card, over emulated NICs and a kernel."""

import pytest
from ranks import FileBootstrap, run_ranks

from epcomm.doctor.report import OK, Finding

pytestmark = pytest.mark.gpu


def find(bootstrap: FileBootstrap, options: str) -> list[Finding]:
    """In a process of its own: the one that ranks are forked from must not use a GPU."""
    from epcomm.doctor.ibgda import run_ibgda_test
    from epcomm.doctor.selftest import SelfTest

    test = SelfTest("ibgda", "emulated-cuda", options, "see", on_gpu=True, direct=True)
    return run_ibgda_test(test)


def test_kernel_writes_and_adds_and_is_refused(gpu, tmp_path):
    ((good, *refused),) = run_ranks(find, 1, tmp_path, "")
    assert good.status == OK, good
    assert "requests by the GPU" in good.text
    assert "an atomic" in good.text
    assert len(refused) == 2, refused
    for finding in refused:
        assert finding.status == OK, finding
        assert "remote access error" in finding.text


def test_additions_that_are_lost_are_seen(gpu, tmp_path):
    """The test of the test: the third message is refused."""
    (findings,) = run_ranks(find, 1, tmp_path, "bad_key=2")
    assert findings[0].status != OK
