"""Thousands of calls on one buffer, each one checked, with random delays inside the kernels."""

import os
import time

import pytest
import torch
from stress import Stress, make_stressed_buffer

pytestmark = [pytest.mark.mpi, pytest.mark.gpu]

CALLS = int(os.environ.get("EPCOMM_TEST_CALLS", "10000"))


def make_buffer(comm, delay_ns, monkeypatch, **options):
    monkeypatch.setenv("EPCOMM_CUDA_DELAY_NS", str(delay_ns))
    return make_stressed_buffer(comm, backend="cuda", **options)


# Few blocks with long delays, and as many as fit with none: other ranks are late by calls, or by
# instructions.
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("delay_ns", "num_sms", "share"), [(20_000, 3, 0.6), (0, None, 0.4)])
def test_every_call_is_right(comm, monkeypatch, delay_ns, num_sms, share):
    with make_buffer(comm, delay_ns, monkeypatch, num_sms=num_sms) as buffer:
        stress = Stress(comm, buffer, torch.device("cuda"), streams=2)
        stress.run(int(CALLS * share))
        torch.cuda.synchronize()
        comm.Barrier()


def test_delays_hold_kernels_up(comm, monkeypatch):
    """Else the test above would not test what it says."""
    took = {}
    for delay_ns in (0, 5_000_000):
        with make_buffer(comm, delay_ns, monkeypatch, num_sms=2) as buffer:
            stress = Stress(comm, buffer, torch.device("cuda"))
            torch.cuda.synchronize()
            comm.Barrier()
            begin = time.monotonic()
            stress.run(30)
            torch.cuda.synchronize()
            took[delay_ns] = time.monotonic() - begin
            comm.Barrier()
    assert took[5_000_000] > took[0] + 0.05
