"""The CPU back end of a Buffer: counts the calls and keeps the rank usable or says it is not."""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from ..backend import CombineCall, Config, DispatchCall, Options
from ..bootstrap import Bootstrap
from ..errors import BufferClosedError, EpcommError, FabricError, PeerTimeoutError
from ..native import constants
from ..results import CombineResult, DispatchResult, Handle
from ..timeline import Trace
from ..topology import Topology
from .combine import Combine
from .control import Waiting
from .dispatch import Dispatch
from .node import Node
from .window import combine_parts

_Result = TypeVar("_Result")


class CpuBackend:
    """Dispatch and combine among processes; see epcomm.backend.Backend."""

    device = torch.device("cpu")

    def __init__(
        self, bootstrap: Bootstrap, topology: Topology, config: Config, options: Options
    ) -> None:
        self.topology = topology
        self.node = Node(bootstrap, topology, config, options)
        self._epoch = 0
        self._combines = 0
        self._arrived_L = np.zeros(topology.ranks_per_node, np.int64)
        self._broken: str | None = None

    def _guard(self, op: str, run: Callable[[], _Result]) -> _Result:
        """Run a call; if it fails half-way, tell the node and refuse further calls."""
        try:
            return run()
        except PeerTimeoutError as error:
            self._broken = str(error)
            raise
        except (EpcommError, ValueError) as error:
            # All but a fabric's: found before data moved, on every rank or told to every rank.
            if isinstance(error, FabricError):
                self._abort(op, error)
            raise
        except BaseException as error:
            self._abort(op, error)
            raise

    def _abort(self, op: str, error: BaseException) -> None:
        """This rank failed half-way: tell whoever depends on it."""
        self._broken = f"{type(error).__name__}: {error}"
        self.node.control.abort(Waiting(constants[op], constants["PHASE_DATA"], self._epoch))

    def _next_epoch(self) -> int:
        self._check_usable()
        self._epoch += 1
        return self._epoch

    def _check_usable(self) -> None:
        if self._broken is not None:
            raise BufferClosedError(f"an earlier call failed, make a new Buffer: {self._broken}")

    def _prepare(self, operation: str, make: Callable[[], _Result]) -> _Result:
        """Do the part of a call that can fail on this rank alone; tell the peers if it does."""
        self._check_usable()
        if self.node.spans is not None:
            self.node.spans.call = self._epoch + 1
        try:
            return make()
        except Exception as error:
            self.refuse(operation, error)
            raise

    def dispatch(self, call: DispatchCall) -> DispatchResult:
        step = self._prepare("dispatch", lambda: Dispatch(self.node, call))
        epoch = self._next_epoch()
        return self._guard("OP_DISPATCH", lambda: step.run(epoch, self._arrived_L))

    def combine(self, call: CombineCall) -> CombineResult:
        step = self._prepare("combine", lambda: Combine(self.node, call))
        epoch = self._next_epoch()
        result = self._guard("OP_COMBINE", lambda: step.run(epoch, self._combines + 1))
        self._combines += 1
        return result

    def refuse(self, operation: str, error: Exception) -> None:
        epoch = self._next_epoch()
        header = self.node.announcer.header(constants[f"OP_{operation.upper()}"], epoch)
        header["status"] = constants["STATUS_REFUSED"]
        header["reason"] = str(error).encode()[: constants["REASON_BYTES"]]

        def announce() -> None:
            self.node.announcer.exchange(header)

        try:
            self._guard("OP_NONE", announce)
        except PeerTimeoutError:
            raise
        except EpcommError:
            pass  # others refused too; this rank's own error is the one to raise

    def combine_input(self, handle: Handle, dtype: torch.dtype) -> torch.Tensor:
        self._check_usable()
        hidden, num_topk = self.node.config.hidden, self.node.config.num_topk
        row_bytes = hidden * torch.empty((), dtype=dtype).element_size()
        parts = combine_parts(handle.num_rows, row_bytes, num_topk, handle.layout == "expert")
        return self.node.windows.lease("combine").tensor(parts.x, (handle.num_rows, hidden), dtype)

    def timeline(self, *, restart: bool) -> Trace:
        assert self.node.timeline is not None
        return self.node.timeline.read(restart=restart)

    def check(self) -> None:
        """Every call has waited for its own end."""

    def close(self) -> None:
        self._broken = "the buffer was closed"
        self.node.close()
