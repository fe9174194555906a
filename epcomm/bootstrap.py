"""How ranks find each other: an MPI communicator or a torch.distributed process group."""

import socket
from pathlib import Path
from typing import Any, Protocol

from .cpu.scaleout import MpiScaleOut, ScaleOut, TorchScaleOut
from .errors import PeerError


class Bootstrap(Protocol):
    """What a Buffer needs of the launcher's world."""

    rank: int
    size: int

    def allgather(self, item: Any) -> list[Any]:
        """Return every rank's ``item``, by rank. Collective."""

    def hosts(self) -> list[object]:
        """For every rank something equal exactly for ranks that share memory. Collective."""

    def scale_out(self) -> ScaleOut:
        """The messages between nodes, for the CPU back end."""

    def close(self) -> None:
        """Let go of what was acquired; local, never waits for a peer."""


class _Shared:
    """The duplicate of a user's communicator, and how many buffers were made from it."""

    _keyval: int | None = None

    def __init__(self, comm: Any) -> None:
        self.comm = comm.Dup()
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


class MpiBootstrap:
    """Bootstrap over a duplicate of an mpi4py communicator, so no message can meet the user's."""

    def __init__(self, comm: Any) -> None:
        shared = _Shared.of(comm)
        shared.buffers += 1  # the same on every rank: buffers are made collectively
        self._number = shared.buffers
        self._comm = shared.comm
        self.rank: int = self._comm.Get_rank()
        self.size: int = self._comm.Get_size()

    def allgather(self, item: Any) -> list[Any]:
        return self._comm.allgather(item)

    def hosts(self) -> list[object]:
        from mpi4py import MPI

        shared = self._comm.Split_type(MPI.COMM_TYPE_SHARED, key=self.rank)
        leader = shared.bcast(self.rank, root=0)
        shared.Free()
        return self.allgather(leader)

    def scale_out(self) -> ScaleOut:
        return MpiScaleOut(self._comm, self._number)

    def close(self) -> None:
        self._comm = None


class TorchBootstrap:
    """Bootstrap over a torch.distributed process group with a CPU back end (gloo)."""

    _made = 0

    def __init__(self, group: Any) -> None:
        import torch.distributed as dist

        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        # A group cannot be duplicated by its members alone, so tags keep apart what is under way
        # for an earlier buffer: every buffer gets a number none of the ranks has used.
        TorchBootstrap._made = self._number = 1 + max(self.allgather(TorchBootstrap._made))

    def allgather(self, item: Any) -> list[Any]:
        import torch.distributed as dist

        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self._group)
        return items

    def hosts(self) -> list[object]:
        # Ranks share memory when they see the same kernel (boot id) and the same processes.
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        pids = Path("/proc/self/ns/pid").readlink()
        return self.allgather((socket.gethostname(), boot, str(pids)))

    def scale_out(self) -> ScaleOut:
        return TorchScaleOut(self._group, self._number)

    def close(self) -> None:
        self._group = None


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


def make_bootstrap(group: Any) -> Bootstrap:
    """Wrap what the user gave.

    Raises:
        TypeError: ``group`` is neither an mpi4py communicator nor a process group.
    """
    if hasattr(group, "Dup") and hasattr(group, "Get_rank"):
        return MpiBootstrap(group)
    import torch.distributed as dist

    if dist.is_available() and isinstance(group, dist.ProcessGroup):
        return TorchBootstrap(group)
    raise TypeError(
        "group: expected an mpi4py communicator or a torch.distributed ProcessGroup, "
        f"got {type(group).__module__}.{type(group).__qualname__}"
    )
