"""How ranks find each other: an MPI communicator or a torch.distributed process group."""

import socket
import time
import weakref
from pathlib import Path
from typing import Any

from .cpu.scaleout import MpiScaleOut, ScaleOut, TorchScaleOut
from .errors import PeerError, PeerTimeoutError
from .exchange import Exchange, poll

#: Seconds a rank may stay silent, unless the user says otherwise.
DEFAULT_TIMEOUT = 60.0


def this_host() -> object:
    """Something equal exactly for ranks that share memory.

    Ranks share memory when they see the same kernel (boot id) and the same processes. The name
    tells apart machines that were copied while they ran.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    pids = Path("/proc/self/ns/pid").readlink()
    return (socket.gethostname(), boot, str(pids))


class Bootstrap:
    """What a Buffer needs of the launcher's world. Every collective ends: see Exchange."""

    def __init__(self, rank: int, size: int, scale_out: ScaleOut, timeout: float) -> None:
        self.rank = rank
        self.size = size
        self._scale_out: ScaleOut | None = scale_out
        self._exchange: Exchange | None = Exchange(rank, size, scale_out, timeout)

    def allgather(self, item: Any) -> list[Any]:
        """Return every rank's ``item``, by rank. Collective.

        Raises:
            PeerTimeoutError: a rank does not take part in time.
        """
        assert self._exchange is not None, "the bootstrap is closed"
        return self._exchange.allgather(item)

    def hosts(self) -> list[object]:
        """``this_host()`` of every rank. Collective."""
        return self.allgather(this_host())

    def scale_out(self) -> ScaleOut:
        """The messages between nodes, for the CPU back end."""
        assert self._scale_out is not None, "the bootstrap is closed"
        return self._scale_out

    def close(self) -> None:
        """Let go of what was acquired; local, never waits for a peer."""
        self._scale_out = self._exchange = None


class _Shared:
    """The duplicate of a user's communicator, and how many buffers were begun on it.

    Messages on a duplicate cannot meet the user's.
    """

    _keyval: int | None = None

    def __init__(self, comm: Any) -> None:
        self.comm, self._request = comm.Idup()
        self._made = False
        self.buffers = 0

    @classmethod
    def of(cls, comm: Any) -> "_Shared":
        """The one of this communicator, kept as its attribute.

        MPI has few communicators and freeing one is collective, while a buffer may close alone.
        """
        from mpi4py import MPI

        if cls._keyval is None:
            cls._keyval = MPI.Comm.Create_keyval()
        shared = comm.Get_attr(cls._keyval)
        if shared is None:
            shared = cls(comm)
            comm.Set_attr(cls._keyval, shared)
        return shared

    def wait(self, timeout: float) -> None:
        """Wait until the duplicate is made. If that takes too long, the next Buffer waits on.

        Raises:
            PeerTimeoutError: it took longer than ``timeout`` seconds.
        """
        self._made = self._made or poll(self._request.Test, time.monotonic() + timeout)
        if not self._made:
            raise PeerTimeoutError(
                f"making the first Buffer of a communicator: after {timeout:g} s some rank has "
                "not begun, or cannot be reached"
            )


class MpiBootstrap(Bootstrap):
    """Over a duplicate of an mpi4py communicator."""

    def __init__(self, comm: Any, timeout: float) -> None:
        shared = _Shared.of(comm)
        # The same on every rank, because buffers are made collectively. What is left under way of
        # one that failed has another number, so that a new one does not take it.
        shared.buffers += 1
        number = shared.buffers
        shared.wait(timeout)
        rank, size = shared.comm.Get_rank(), shared.comm.Get_size()
        super().__init__(rank, size, MpiScaleOut(shared.comm, number), timeout)


#: Buffers begun on each process group, as for a communicator. A group cannot be duplicated by its
#: members alone.
_buffers: "weakref.WeakKeyDictionary[Any, int]" = weakref.WeakKeyDictionary()


class TorchBootstrap(Bootstrap):
    """Over a torch.distributed process group with a CPU back end (gloo)."""

    def __init__(self, group: Any, timeout: float) -> None:
        import torch.distributed as dist

        number = _buffers[group] = _buffers.get(group, 0) + 1
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        super().__init__(rank, size, TorchScaleOut(group, number), timeout)


def raise_together(bootstrap: Bootstrap, error: Exception | None) -> None:
    """Raise on every rank if a step of making a Buffer failed on any. Collective.

    Raises:
        PeerError: it failed on other ranks; where it failed, ``error`` itself.
    """
    reports = bootstrap.allgather(None if error is None else str(error))
    if error is not None:
        raise error
    failed = {r: why for r, why in enumerate(reports) if why is not None}
    if failed:
        reasons = "; ".join(f"rank {r}: {why}" for r, why in failed.items())
        raise PeerError(f"Buffer refused by other ranks: {reasons}", tuple(failed))


def make_bootstrap(group: Any, timeout: float = DEFAULT_TIMEOUT) -> Bootstrap:
    """Wrap what the user gave. Collective; an exchange ends after ``timeout`` seconds.

    Raises:
        PeerTimeoutError: a rank does not take part in time.
        TypeError: ``group`` is neither an mpi4py communicator nor a process group.
    """
    if hasattr(group, "Dup") and hasattr(group, "Get_rank"):
        return MpiBootstrap(group, timeout)
    import torch.distributed as dist

    if dist.is_available() and isinstance(group, dist.ProcessGroup):
        return TorchBootstrap(group, timeout)
    raise TypeError(
        "group: expected an mpi4py communicator or a torch.distributed ProcessGroup, "
        f"got {type(group).__module__}.{type(group).__qualname__}"
    )
