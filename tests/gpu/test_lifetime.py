"""Buffers that come and go, several at once, and results that outlive them."""

import gc
import os
from dataclasses import replace
from pathlib import Path

import cupy
import pytest
import torch
from on_gpu import SMALL, check, draw_tokens, make_buffer
from stress import Stress, make_stressed_buffer

pytestmark = [pytest.mark.mpi, pytest.mark.gpu]

BUFFERS = int(os.environ.get("EPCOMM_TEST_BUFFERS", "150"))


def case_of(comm):
    return replace(SMALL, ranks_per_node=comm.size)


def in_use(comm):
    """(open files, threads, host bytes, device bytes of all ranks on this GPU)."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    cupy.get_default_memory_pool().free_all_blocks()
    comm.Barrier()
    free, total = torch.cuda.mem_get_info()
    files, threads = (len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task"))
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    comm.Barrier()
    return files, threads, pages * os.sysconf("SC_PAGE_SIZE"), total - free


@pytest.mark.timeout(600)
def test_buffers_made_and_closed_leak_nothing(comm):
    """A control block left behind by each would be hundreds of MiB in the end."""

    def one():
        with make_buffer(comm, case_of(comm), num_sms=2) as buffer:
            x, topk_idx = draw_tokens(comm)
            got = buffer.dispatch(x, topk_idx)
            buffer.combine(got.x, got.handle)

    for _ in range(10):
        one()
    before = in_use(comm)
    for _ in range(BUFFERS):
        one()
    after = in_use(comm)
    files, threads, host, device = (b - a for a, b in zip(before, after, strict=True))
    assert files <= 0
    assert threads <= 0
    assert host < 48 << 20
    assert device < 32 << 20


def test_several_buffers_take_turns_on_several_streams(comm):
    """Each result is checked; calls of one buffer run while the others' are under way."""
    buffers = [make_stressed_buffer(comm, backend="cuda", num_sms=num_sms) for num_sms in (1, 2, 4)]
    users = [Stress(comm, buffer, torch.device("cuda")) for buffer in buffers]
    streams = [torch.cuda.Stream() for _ in users]
    torch.cuda.synchronize()
    for number in range(60):
        for user, stream in zip(users, streams, strict=True):
            with torch.cuda.stream(stream):
                user.round(number)
    for user, stream in zip(users, streams, strict=True):
        with torch.cuda.stream(stream):
            user.judge()
    torch.cuda.synchronize()
    comm.Barrier()
    for buffer in buffers:
        buffer.close()


def test_results_outlive_the_buffer_and_those_after_it(comm):
    """Their windows are not given to later buffers, whose windows peers write to."""
    kept = []
    for seed in range(4):
        torch.manual_seed(seed)
        with make_buffer(comm, case_of(comm)) as buffer:
            x, topk_idx = draw_tokens(comm)
            got = buffer.dispatch(x, topk_idx)
            rows = buffer.combine_input(got.handle).copy_(got.x)
            out = buffer.combine(rows, got.handle)
            kept += [(t, t.clone()) for t in (got.x, got.source, rows, out.x)]
            del got, rows, out
    torch.cuda.synchronize()
    comm.Barrier()
    for tensor, copy in kept:
        assert torch.equal(tensor.view(torch.int16), copy.view(torch.int16))


def test_too_many_sms_for_two_buffers_are_refused(comm):
    """Ranks are on one GPU each, or several on one: what they hold is counted by GPU."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    places = comm.allgather(str(torch.cuda.get_device_properties(0).uuid))
    share = sms // max(places.count(place) for place in places)
    case = case_of(comm)
    with pytest.raises(ValueError, match=f"num_sms: .* and it has {sms}"):
        make_buffer(comm, case, num_sms=sms + 1)
    first = make_buffer(comm, case, num_sms=share // 2 + 1)
    with pytest.raises(ValueError, match="open buffers and network cards hold"):
        make_buffer(comm, case, num_sms=share // 2 + 1)
    first.close()
    with make_buffer(comm, case, num_sms=share // 2 + 1) as second:
        check(comm, case, second)


def test_a_buffer_that_is_dropped_gives_its_sms_back(comm):
    case = case_of(comm)
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    buffer = make_buffer(comm, case, num_sms=sms // comm.size)
    check(comm, case, buffer)
    torch.cuda.synchronize()
    comm.Barrier()
    del buffer
    gc.collect()
    with make_buffer(comm, case, num_sms=sms // comm.size) as fresh:
        check(comm, case, fresh)
