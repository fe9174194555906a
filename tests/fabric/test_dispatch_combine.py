"""A whole dispatch and combine over a network card: 8 ranks on 2 virtual nodes, as the oracle."""

import subprocess

import pytest
from conftest import end_with_children

#: Seconds; importing torch takes a minute where the processor is emulated, more on a busy machine.
PATIENCE = 400.0
CASES = ("bf16", "fp8 to experts", "packed, some ranks empty")


@pytest.fixture(scope="module")
def output(rdma: list[str], request: pytest.FixtureRequest) -> str:
    started = request.getfixturevalue("started")
    try:
        text, _ = started.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        end_with_children(started)
        text, _ = started.communicate()
        text += f"\nkilled after {PATIENCE} s"
    return text if started.returncode == 0 else f"status {started.returncode}\n{text}"


@pytest.mark.timeout(PATIENCE + 20)
@pytest.mark.parametrize("case", CASES)
def test_same_bytes_as_the_oracle(output, case):
    assert f"{case}: as the oracle" in output, output
