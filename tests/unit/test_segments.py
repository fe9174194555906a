"""Shared segments, leases and the window pool."""

import gc
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from epcomm.cpu.segments import PeerWindows, Segment, WindowPool

PAGE = 4096


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def mappings(name: str) -> int:
    return Path("/proc/self/maps").read_text().count(name)


def test_two_mappings_are_one_memory():
    own = Segment.create("epcomm-test-a", PAGE)
    peer = Segment.open_peer(os.getpid(), own.fd, PAGE)
    assert own.address != peer.address
    assert not own.array(0, PAGE).any()
    own.array(8, 4)[:] = [1, 2, 3, 4]
    assert peer.array(0, PAGE)[8:12].tolist() == [1, 2, 3, 4]


def test_a_segment_is_gone_with_its_last_user():
    gc.collect()  # what other tests left
    before = descriptors()
    own = Segment.create("epcomm-test-b", PAGE)
    peer = Segment.open_peer(os.getpid(), own.fd, PAGE)
    view = peer.array(0, PAGE)
    del own
    gc.collect()
    view[0] = 7  # still mapped
    del peer, view
    gc.collect()
    assert descriptors() == before
    assert mappings("epcomm-test-b") == 0


def test_the_process_or_descriptor_is_gone():
    own = Segment.create("epcomm-test-c", PAGE)
    fd = own.fd
    del own
    gc.collect()
    with pytest.raises(FileNotFoundError, match="cannot map the shared memory of process"):
        Segment.open_peer(os.getpid(), fd + 1000, PAGE)
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    with pytest.raises(OSError, match=f"process {pid}"):
        Segment.open_peer(pid, 3, PAGE)


def test_large_segments_cost_nothing_until_touched():
    """Sparse: far more than this machine's memory can be reserved."""
    segment = Segment.create("epcomm-test-d", 1 << 42)
    segment.array((1 << 42) - 8, 8)[:] = 1
    assert os.fstat(segment.fd).st_blocks * 512 < 1 << 22


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int64])
def test_tensors_of_a_lease(dtype):
    pool = WindowPool(PAGE)
    lease = pool.lease("test")
    tensor = lease.tensor(256, (3, 5), dtype)
    assert tensor.shape == (3, 5)
    assert tensor.dtype == dtype
    tensor.fill_(1)
    raw = lease.segment.array(0, PAGE)
    nbytes = 15 * tensor.element_size()
    np.testing.assert_array_equal(
        raw[256 : 256 + nbytes], tensor.view(torch.uint8).numpy().reshape(-1)
    )
    assert not raw[256 + nbytes :].any()
    assert pool.find(tensor) == (lease.segment, lease.serial, 256)
    assert pool.find(tensor[1:]) == (lease.segment, lease.serial, 256 + 5 * tensor.element_size())


def test_empty_tensors_hold_nothing():
    pool = WindowPool(PAGE)
    lease = pool.lease("test")
    empty = lease.tensor(PAGE, (0, 7), torch.float32)
    assert empty.shape == (0, 7)
    first = lease.segment
    del lease
    assert pool.lease("test").segment is first


def test_memory_outside_the_pool_is_not_found():
    pool = WindowPool(PAGE)
    lease = pool.lease("test")
    assert pool.find(torch.zeros(4)) is None
    assert pool.find(WindowPool(PAGE).lease("test").tensor(0, (4,), torch.float32)) is None
    assert pool.find(lease.tensor(0, (4,), torch.float32)) is not None


def test_a_window_is_lent_until_the_last_tensor_is_gone():
    pool = WindowPool(PAGE)
    lease = pool.lease("test")
    first, view = lease.segment, lease.tensor(0, (8,), torch.float32)[2:4]
    array = view.numpy()
    del lease, view
    gc.collect()
    other = pool.lease("test")
    assert other.segment is not first
    del array
    gc.collect()
    assert pool.lease("test").segment is first


def test_last_in_first_out():
    """The window used last is the warmest."""
    pool = WindowPool(PAGE)
    one, two = pool.lease("test"), pool.lease("test")
    first, second = one.segment, two.segment
    del two
    del one
    assert pool.lease("test").segment is first
    assert first is not second


def test_a_pool_ends_with_its_leases():
    pool = WindowPool(PAGE)
    before = descriptors()
    tensor = pool.lease("test").tensor(0, (4,), torch.float32)
    assert descriptors() > before
    del pool
    gc.collect()
    tensor.fill_(3)
    del tensor
    gc.collect()
    assert descriptors() == before


def test_peer_windows_are_mapped_once():
    windows = PeerWindows()
    own = Segment.create("epcomm-test-e", PAGE)
    address = windows.address(os.getpid(), own.fd, 0, PAGE)
    assert windows.address(os.getpid(), own.fd, 0, PAGE) == address
    other = Segment.create("epcomm-test-f", PAGE)
    assert windows.address(os.getpid(), other.fd, 1, PAGE) != address
