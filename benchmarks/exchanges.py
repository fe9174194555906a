"""The all-to-alls the flat alternative is timed over: MPI and torch.distributed's gloo."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from mpi4py import MPI
from numpy.typing import NDArray


class MpiExchange:
    """``MPI_Alltoallv`` with a row as the unit, so that no count outgrows 32 bits."""

    name = "flat MPI_Alltoallv"

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.rank = comm.rank
        self._comm = comm

    def counts(self, send_R: NDArray[np.int64]) -> NDArray[np.int64]:
        """Exchange the counts with ``MPI_Alltoall``."""
        receive_R = np.empty_like(send_R)
        self._comm.Alltoall(send_R, receive_R)
        return receive_R

    def rows(
        self,
        send: torch.Tensor,
        send_R: NDArray[np.int64],
        receive: torch.Tensor,
        receive_R: NDArray[np.int64],
    ) -> None:
        """Exchange contiguous rows of any dtype."""
        row = MPI.BYTE.Create_contiguous(send.shape[1] * send.element_size()).Commit()
        self._comm.Alltoallv(
            [_bytes(send), (send_R, None), row], [_bytes(receive), (receive_R, None), row]
        )
        row.Free()


class GlooExchange:
    """``torch.distributed.all_to_all_single`` with splits, over gloo."""

    name = "gloo all_to_all_single"

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank = dist.get_rank(group)
        self._group = group

    def counts(self, send_R: NDArray[np.int64]) -> NDArray[np.int64]:
        """Exchange the counts with ``all_to_all_single``."""
        receive_R = np.empty_like(send_R)
        dist.all_to_all_single(
            torch.from_numpy(receive_R), torch.from_numpy(send_R), group=self._group
        )
        return receive_R

    def rows(
        self,
        send: torch.Tensor,
        send_R: NDArray[np.int64],
        receive: torch.Tensor,
        receive_R: NDArray[np.int64],
    ) -> None:
        """Exchange contiguous rows of any dtype."""
        dist.all_to_all_single(
            receive, send, receive_R.tolist(), send_R.tolist(), group=self._group
        )


def _bytes(x: torch.Tensor) -> Any:
    return x.view(torch.uint8).numpy()


class GlooWorld:
    """The gloo side of the launched ranks. Making it and its groups is collective."""

    def __init__(self) -> None:
        comm = MPI.COMM_WORLD
        # Rank 0 picks a free port and the others learn it over MPI.
        store = None
        if comm.rank == 0:
            store = dist.TCPStore("localhost", 0, comm.size, is_master=True, wait_for_workers=False)
        host, port = comm.bcast((MPI.Get_processor_name(), store.port) if store else None)
        if store is None:
            same = host == MPI.Get_processor_name()
            store = dist.TCPStore("localhost" if same else host, port, comm.size, is_master=False)
        dist.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)

    def group(self, size: int) -> dist.ProcessGroup:
        """Make a group of the first ``size`` ranks; collective over all of them."""
        return dist.new_group(range(size))

    def close(self) -> None:
        """Leave the process groups; collective."""
        dist.destroy_process_group()
