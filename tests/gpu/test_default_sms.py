"""The number of SMs chosen without being told: alike on the ranks of a GPU, and never too many."""

import pytest
import torch
from harness import Case
from on_gpu import check, make_buffer

pytestmark = [pytest.mark.mpi, pytest.mark.gpu]


def test_ranks_of_a_gpu_agree_and_fit(comm):
    case = Case(comm.size, hidden=512)
    with make_buffer(comm, case) as buffer:
        measured = buffer._backend.tuning.num_sms
    with make_buffer(comm, case) as buffer:
        sms = buffer._backend.tuning.num_sms
        assert sms == measured  # remembered
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        chosen = comm.allgather((str(properties.uuid), sms))
        mine = [number for gpu, number in chosen if gpu == chosen[comm.rank][0]]
        assert set(mine) == {sms}
        assert sum(mine) <= properties.multi_processor_count
        check(comm, case, buffer)


def test_some_ranks_choose_and_others_are_told(comm):
    case = Case(comm.size, hidden=512)
    with make_buffer(comm, case, num_sms=2 if comm.rank == 0 else None) as buffer:
        assert comm.rank != 0 or buffer._backend.tuning.num_sms == 2
        check(comm, case, buffer)
