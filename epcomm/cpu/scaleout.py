"""Messages between nodes, along rails: one per destination node and phase.

Messages of one (peer, tag) arrive in the order sent; that is all the protocol relies on.
"""

import atexit
import contextlib
import enum
import threading
import weakref
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, Protocol

import numpy as np


class Tag(enum.IntEnum):
    """What a message is."""

    ANNOUNCE = 1
    DATA = 2
    RETURN = 3
    ABORT = 4
    START = 5


class Request(Protocol):
    """A message under way."""

    def done(self) -> bool:
        """Whether it has completed; never blocks. Raises ConnectionError if it cannot any more."""


class ScaleOut(Protocol):
    """A transport for bytes between nodes. Buffers stay untouched until a request is done."""

    def inbox(self, rank: int, nbytes: int) -> np.ndarray:
        """Memory to receive a rank's records in, uint8; warm, and valid until the next call."""

    def outbox(self, rank: int, nbytes: int) -> np.ndarray:
        """Memory to pack records for a rank in, likewise."""

    def send(self, rank: int, tag: Tag, data: np.ndarray) -> Request:
        """Start sending ``data`` (uint8 [units, unit bytes])."""

    def receive(self, rank: int, tag: Tag, into: np.ndarray) -> Request:
        """Start receiving exactly ``into.nbytes`` bytes (uint8 [units, unit bytes])."""

    def send_abort(self, rank: int, message: np.ndarray) -> None:
        """Tell a rank that this one gave up; best effort, never waits."""

    def poll_abort(self, into: np.ndarray) -> bool:
        """Whether a peer gave up; fills ``into`` with its message."""

    def close(self) -> None:
        """Let go of threads and memory; local, never waits for a peer."""


class Staging:
    """Private memory for records, by direction and rank; grows and is kept, so it stays warm."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[str, int], np.ndarray] = {}

    def inbox(self, rank: int, nbytes: int) -> np.ndarray:
        return self._get(("in", rank), nbytes)

    def outbox(self, rank: int, nbytes: int) -> np.ndarray:
        return self._get(("out", rank), nbytes)

    def _get(self, key: tuple[str, int], nbytes: int) -> np.ndarray:
        array = self._arrays.get(key)
        if array is None or array.size < nbytes:
            array = self._arrays[key] = np.empty(nbytes, np.uint8)
        return array[:nbytes]

    def close(self) -> None:
        self._arrays.clear()


#: Requests of transports that are gone. MPI may still touch their memory, which they keep.
_abandoned: list[Any] = []


def _abandon(receives: list[Any], sends: list[Any]) -> None:
    for request in receives:
        if not request.Test():
            request.Cancel()
    _abandoned[:] = [r for r in (*_abandoned, *receives, *sends) if not r.Test()]


class MpiScaleOut(Staging):
    """mpi4py point-to-point messages. ``number`` tells the buffers of a communicator apart."""

    #: Requests kept before the completed ones are dropped.
    _MANY = 64

    def __init__(self, comm: Any, number: int) -> None:
        from mpi4py import MPI

        super().__init__()
        self._comm = comm
        # MPI promises this attribute of the world only; Open MPI 4 has it nowhere else.
        most = MPI.COMM_WORLD.Get_attr(MPI.TAG_UB) or 32767
        self._first_tag = number % (most // len(Tag) - 1) * len(Tag)
        self._types: dict[int, Any] = {}
        # After a failed call messages may be under way; a rank that comes late still sends and
        # receives them. So requests are kept, and with them their memory, until they are done.
        self._receives: list[Any] = []
        self._sends: list[Any] = []
        weakref.finalize(self, _abandon, self._receives, self._sends)

    def _describe(self, data: np.ndarray) -> list[Any]:
        # A row as MPI's unit keeps the count far below 2^31, whatever the message's size.
        from mpi4py import MPI

        units, unit_bytes = data.shape
        if unit_bytes not in self._types:
            self._types[unit_bytes] = MPI.BYTE.Create_contiguous(unit_bytes).Commit()
        return [data, units, self._types[unit_bytes]]

    def _keep(self, requests: list[Any], request: Any) -> Request:
        if len(requests) >= self._MANY:
            requests[:] = [r for r in requests if not r.Test()]
        requests.append(request)
        return _MpiRequest(request)

    def send(self, rank: int, tag: Tag, data: np.ndarray) -> Request:
        request = self._comm.Isend(self._describe(data), dest=rank, tag=self._first_tag + tag)
        return self._keep(self._sends, request)

    def receive(self, rank: int, tag: Tag, into: np.ndarray) -> Request:
        request = self._comm.Irecv(self._describe(into), source=rank, tag=self._first_tag + tag)
        return self._keep(self._receives, request)

    def send_abort(self, rank: int, message: np.ndarray) -> None:
        # As bytes: MPI has no datatype for a structure.
        data = message.view(np.uint8)
        self._keep(self._sends, self._comm.Isend(data, dest=rank, tag=self._first_tag + Tag.ABORT))

    def poll_abort(self, into: np.ndarray) -> bool:
        from mpi4py import MPI

        status, tag = MPI.Status(), self._first_tag + Tag.ABORT
        if not self._comm.Iprobe(source=MPI.ANY_SOURCE, tag=tag, status=status):
            return False
        self._comm.Recv(into.view(np.uint8), source=status.Get_source(), tag=tag)
        return True


class _MpiRequest:
    def __init__(self, request: Any) -> None:
        self._request = request

    def done(self) -> bool:
        return bool(self._request.Test())


#: Threads that wait for gloo, each with the group and a peer.
_waiting: dict[threading.Thread, tuple[Any, int]] = {}


def _end_waits() -> None:
    """At exit, end the waits for messages that never came.

    A thread that wakes in C++ while the interpreter goes would abort the process. Gloo cannot
    cancel a wait, but one that times out closes the group's connections, which ends all others.
    """
    import torch

    for group, peer in set(_waiting.values()):
        with contextlib.suppress(RuntimeError):
            group.recv([torch.empty(1)], peer, Tag.ABORT).wait(timedelta(milliseconds=1))
    for thread in list(_waiting):
        thread.join(1.0)


class TorchScaleOut(Staging):
    """torch.distributed point-to-point messages (gloo).

    Gloo's requests can be waited for but not tested, so a thread waits for each; it has no probe
    either, so an abort does not cross nodes and the peer's own deadline ends its wait. ``number``
    tells the buffers of a group apart.
    """

    #: Gloo's wait needs an end of its own; epcomm's deadline comes first.
    _GLOO_TIMEOUT = timedelta(hours=1)

    def __init__(self, group: Any, number: int) -> None:
        import torch.distributed as dist

        super().__init__()
        self._group = group
        self._first_tag = number * len(Tag)
        self._global = dist.get_process_group_ranks(group)
        atexit.unregister(_end_waits)
        atexit.register(_end_waits)

    def _start(self, operation: Any, data: np.ndarray, rank: int, tag: Tag) -> Request:
        import torch

        future: Future[Any] = Future()
        tensor = torch.from_numpy(data)
        try:
            number = self._first_tag + tag
            work = operation(tensor, self._global[rank], group=self._group, tag=number)
        except RuntimeError as error:  # the connection is closed already
            future.set_exception(error)
            return _ThreadRequest(future, tensor)

        def wait() -> None:
            try:
                future.set_result(work.wait(self._GLOO_TIMEOUT))
            except Exception as error:  # handed to whoever asks the request
                future.set_exception(error)
            del _waiting[thread]

        # A daemon: a message that never comes must not keep the process from ending.
        thread = threading.Thread(target=wait, name="epcomm-gloo", daemon=True)
        _waiting[thread] = (self._group, rank)
        thread.start()
        return _ThreadRequest(future, tensor)

    def send(self, rank: int, tag: Tag, data: np.ndarray) -> Request:
        import torch.distributed as dist

        return self._start(dist.isend, data, rank, tag)

    def receive(self, rank: int, tag: Tag, into: np.ndarray) -> Request:
        import torch.distributed as dist

        return self._start(dist.irecv, into, rank, tag)

    def send_abort(self, rank: int, message: np.ndarray) -> None:
        del rank, message

    def poll_abort(self, into: np.ndarray) -> bool:
        del into
        return False


class _ThreadRequest:
    def __init__(self, future: "Future[Any]", keep: Any) -> None:
        self._future = future
        self._keep = keep

    def done(self) -> bool:
        if not self._future.done():
            return False
        error = self._future.exception()
        if error is not None:
            raise ConnectionError(str(error)) from error
        return True
