"""Buffer: the public face of epcomm."""

import math
import os
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch

from .backend import Backend, Config, Options
from .bootstrap import DEFAULT_TIMEOUT, Bootstrap, make_bootstrap, raise_together
from .check import (
    check_combine,
    check_config,
    check_dispatch,
    check_fabric,
    check_handle,
    check_int,
    check_layout,
    check_row,
    check_tensor,
    row_format,
)
from .clocks import compare_hosts
from .cpu.backend import CpuBackend
from .cpu.layout import BadChoice, make_layout
from .cpu.memory_report import report_memory
from .errors import BufferClosedError, MismatchError
from .native import constants
from .results import (
    CombineResult,
    DispatchLayout,
    DispatchResult,
    Event,
    Handle,
    Layout,
    MemoryReport,
)
from .timeline import Trace
from .topology import Topology, make_topology

Packed = tuple[torch.Tensor, torch.Tensor]


class Buffer:
    """Moves the tokens of one expert-parallel group.

    Letters in shapes: R ranks, N nodes, T this rank's tokens, H hidden, K top-k, E experts over
    all ranks (rank r holds the E/R experts from r * E/R), M rows this rank receives.

    Making a Buffer and every ``dispatch`` and ``combine`` are collective: all ranks of the group
    call them in the same order. Bad arguments are found before anything is sent: the rank that
    has them raises TypeError or ValueError, the others PeerError, and the buffer stays usable.

    Args:
        group: an mpi4py communicator, or a torch.distributed process group with a CPU back end.
        hidden: H, a multiple of 8 (of 16 to send FP8).
        num_experts: E, a multiple of R.
        num_topk: K.
        max_tokens: most tokens a rank will send in one call.
        ranks_per_node: make virtual nodes of this many consecutive ranks; None: a node is a host.
        timeout: seconds a rank may stay silent before the others give up on it, also while the
            Buffer is made ("cuda": at least 60 there).
        backend: "cpu"; "cuda" for tensors on this rank's GPU, inside one node; "auto": "cpu".
        num_threads: threads of this rank; None: this host's cores shared by its ranks.
        num_sms: "cuda": SMs a call of this rank uses; None: as many as keep nine tenths of the
            GPU's memory or link rate busy, measured once, but no more than its share of the
            GPU, and a quarter of it.
        fabric: what carries messages between nodes. "auto": on the CPU the group's own, MPI or
            gloo; on GPUs the first that all ranks can use of "ibgda", "proxy/verbs" and
            "proxy/local", logged as "epcomm" by rank 0; "mpi" (CPU);
            "ibgda" (GPU): kernels fill the queues of a ConnectX network card (docs/ibgda.md);
            "proxy/local": proxy threads and shared memory, for virtual nodes of one machine;
            "proxy/verbs": proxy threads and an InfiniBand or RoCE network card. Options of the
            card may follow, such as "proxy/verbs tc=106 gid=3" (docs/fabric-verbs.md);
            "proxy/emulated" and (GPU) "emulated": emulated mlx5 NICs of a modelled network, which
            proxy threads or kernels post to, for tests and comparisons.
        max_staging_bytes: "cuda" with several nodes: most bytes of the memory that records are sent
            from and received in, together; None: a place for every record of a call, which other
            nodes x max_tokens x (8 x hidden + labels) bytes take. With less a sender waits for the
            receiver. The same on all ranks.
        timeline: note what the calls do, and when, for the method ``timeline``. The same on all
            ranks. Kernels then take a little longer; without it they note nothing.

    Raises:
        TypeError: an argument of the wrong type, on the rank that passed it.
        ValueError: an argument out of range, likewise.
        PeerError: another rank's arguments were refused, or it cannot share memory.
        MismatchError: the ranks passed different values.
        PeerTimeoutError: a rank does not take part in time; another Buffer may be tried.
        FabricError: the fabric cannot be made on this rank; "auto", and there is none.
        OSError: memory cannot be shared with a rank of the node.
    """

    def __init__(
        self,
        group: Any,
        *,
        hidden: int,
        num_experts: int,
        num_topk: int,
        max_tokens: int,
        ranks_per_node: int | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        backend: Literal["auto", "cpu", "cuda"] = "auto",
        num_threads: int | None = None,
        num_sms: int | None = None,
        fabric: str = "auto",
        max_staging_bytes: int | None = None,
        timeline: bool = False,
    ) -> None:
        self._backend: Backend | None = None
        # A rank whose timeout is refused takes part until all know that. One that starts a GPU, or
        # measures it for all, is busy for seconds and not silent.
        patience = timeout if _is_timeout(timeout) else DEFAULT_TIMEOUT
        if backend == "cuda":
            patience = max(patience, DEFAULT_TIMEOUT)
        bootstrap = make_bootstrap(group, patience)
        self._bootstrap = bootstrap
        device = "cuda" if backend == "cuda" else "cpu"
        self.config = Config(
            hidden, num_experts, num_topk, max_tokens, device, max_staging_bytes=max_staging_bytes
        )
        hosts = bootstrap.hosts()
        error: Exception | None = None
        try:
            check_config(self.config, bootstrap.size)
            counts = {
                "num_threads": num_threads,
                "ranks_per_node": ranks_per_node,
                "num_sms": num_sms,
            }
            _check_options(timeout, backend, counts)
            if not isinstance(timeline, bool):
                raise TypeError(f"timeline: expected a bool, got {type(timeline).__name__}")
            check_fabric(fabric, backend, bootstrap)
            topology = make_topology(bootstrap.rank, hosts, ranks_per_node)
            backend_class = _find_backend(backend)
        except (TypeError, ValueError) as caught:
            error = caught
        _agree(bootstrap, (self.config, ranks_per_node, backend, fabric, timeline), error)
        clock = compare_hosts(bootstrap) if timeline else None
        self._has_timeline = timeline
        cores = len(os.sched_getaffinity(0))
        on_host = sum(host == hosts[bootstrap.rank] for host in hosts)
        if num_threads is None:
            num_threads = max(1, cores // on_host)
        options = Options(float(timeout), num_threads, cores >= on_host, num_sms, fabric, clock)
        self._backend = backend_class(bootstrap, topology, self.config, options)
        self.config = replace(self.config, device=str(self._backend.device))
        self._owner = topology  # tells handles of this buffer from others

    # The world ----------------------------------------------------------------------------

    @property
    def topology(self) -> Topology:
        """Who sits where."""
        return self._open().topology

    @property
    def rank(self) -> int:
        """This rank."""
        return self._bootstrap.rank

    @property
    def num_ranks(self) -> int:
        """R."""
        return self._bootstrap.size

    @property
    def num_nodes(self) -> int:
        """N."""
        return self.topology.num_nodes

    @property
    def ranks_per_node(self) -> int:
        """L."""
        return self.topology.ranks_per_node

    @property
    def num_local_experts(self) -> int:
        """E/R."""
        return self.config.num_experts // self.num_ranks

    # Operations ---------------------------------------------------------------------------

    def get_dispatch_layout(self, topk_idx: torch.Tensor) -> DispatchLayout:
        """Count where tokens would go. Local; ``dispatch`` does not need it.

        Args:
            topk_idx: global expert ids, int64 or int32 [T, K], -1 for a dropped choice.

        Raises:
            TypeError, ValueError: as ``dispatch`` does for ``topk_idx``.
        """
        topology = self._open().topology
        shape = (None, self.config.num_topk)
        device = self.config.device
        check_tensor("topk_idx", topk_idx, [torch.int64, torch.int32], shape, device=device)
        topk_idx_TK = np.ascontiguousarray(topk_idx.cpu().numpy(), dtype=np.int64)
        layout = make_layout(topk_idx_TK, topology.node_of_R, self.config.num_experts, False)
        if isinstance(layout, BadChoice):
            raise layout.error(topk_idx_TK, self.config.num_experts)
        is_token_in_rank = np.zeros((len(topk_idx_TK), self.num_ranks), bool)
        token, choice = np.nonzero(topk_idx_TK >= 0)
        rank = topk_idx_TK[token, choice] // self.num_local_experts
        is_token_in_rank[token, rank] = True
        return DispatchLayout(
            tokens_per_rank=torch.from_numpy(layout.rank_rows_R).to(device),
            tokens_per_node=torch.from_numpy(layout.node_tokens_N).to(device),
            tokens_per_expert=torch.from_numpy(layout.expert_rows_E).to(device),
            is_token_in_rank=torch.from_numpy(is_token_in_rank).to(device),
        )

    def dispatch(
        self,
        x: torch.Tensor | Packed,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        *,
        quantize: Literal["fp8", "fp8_ue8m0"] | None = None,
        layout: Layout = "rank",
        alignment: int = 1,
        fixed_rows: int | None = None,
        handle: Handle | None = None,
        previous_event: Event | None = None,
        async_op: bool = False,
    ) -> DispatchResult:
        """Send every token to the ranks that hold its experts. Collective.

        Args:
            x: rows, contiguous: bfloat16 or float32 [T, H]; or a packed pair of float8_e4m3fn
                [T, H] and scales, float32 [T, ceil(H/128)] or int32 [T, ceil(H/512)] (UE8M0).
            topk_idx: global expert ids, int64 or int32 [T, K], distinct within a row, -1 for a
                dropped choice. None with ``handle``.
            topk_weights: float32 [T, K], or None; all ranks alike.
            quantize: pack bfloat16 or float32 rows to FP8 while sending them, with float32
                ("fp8") or power-of-two ("fp8_ue8m0") scales; see epcomm.formats.
            layout: "rank": one row per (token, rank) in (source rank, source token) order;
                "expert": one row per (token, expert), grouped by local expert, in that order
                within a group.
            alignment: layout "expert": each group is padded with zero rows to a multiple.
            fixed_rows: size of the output whatever arrives; rows in excess are zero, with
                ``topk_idx`` -1, weight 0 and source -1. The same on all ranks.
            handle: of an earlier dispatch: use its routes, layout, alignment and fixed_rows
                again, without counting.
            previous_event: what to wait for before ``x`` is read.
            async_op: return before the data has arrived where the back end can; the CPU back end
                never does.

        Returns:
            A DispatchResult.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: wrong shape, device, layout in memory; an id out of range or twice in a
                row; more than max_tokens tokens; a released or foreign handle; ``fixed_rows``
                too few for some rank (on every rank).
            PeerError: another rank's arguments were refused; nothing was sent.
            MismatchError: the ranks passed different formats, layouts, handles or operations.
            PeerTimeoutError: a rank is silent or gone; the buffer is unusable.
            BufferClosedError: the buffer is closed or unusable.
        """
        backend = self._open()
        if previous_event is not None:
            previous_event.wait()
        try:
            call = check_dispatch(
                self.config,
                self._owner,
                x,
                topk_idx,
                topk_weights,
                quantize=quantize,
                layout=layout,
                alignment=alignment,
                fixed_rows=fixed_rows,
                handle=handle,
            )
        except (TypeError, ValueError) as error:
            backend.refuse("dispatch", error)
            raise
        call.async_op = async_op
        return backend.dispatch(call)

    def combine(
        self,
        x: torch.Tensor,
        handle: Handle,
        *,
        weights: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor, ...] | None = None,
        wire: Literal["bf16", "f32", "logfmt8", "logfmt10"] | None = None,
        out: torch.Tensor | None = None,
        previous_event: Event | None = None,
        async_op: bool = False,
    ) -> CombineResult:
        """Bring the rows of a dispatch home and sum them. Collective.

        Token t gets ``sum over nodes of round_wire(sum over the node's rows of weight * row)``
        plus the biases, in float32, rounded once at the end. Rows add up in ascending rank order
        (layout "expert": ascending choice within a rank), nodes in ascending order; the token's
        own node is not rounded in between. A token without any destination gets the biases alone.

        Args:
            x: rows in the order of the dispatch's output, bfloat16 or float32 [M, H]. Rows in
                memory of epcomm's (from ``combine_input``, or a dispatch's own output) are read
                in place when no weights are passed; others are copied first.
            handle: of the dispatch.
            weights: float32 [M], a factor for each row; None: a plain sum.
            topk_weights: float32 [M, K] ([M] in layout "expert") to bring home as [T, K]: choice
                k of a token comes from the rank that holds its expert. All ranks alike.
            bias: one or two tensors [T, H] of x's dtype, added in order after the sum.
            wire: format between nodes; default x's own. LogFMT: see epcomm.formats.
            out: memory for the result, [T, H] of x's dtype.
            previous_event: what to wait for before ``x`` is read.
            async_op: as for ``dispatch``.

        Returns:
            A CombineResult.

        Raises:
            As ``dispatch``.
        """
        backend = self._open()
        if previous_event is not None:
            previous_event.wait()
        try:
            call = check_combine(
                self.config,
                self._owner,
                x,
                handle,
                weights=weights,
                topk_weights=topk_weights,
                bias=bias,
                wire=wire,
                out=out,
            )
        except (TypeError, ValueError) as error:
            backend.refuse("combine", error)
            raise
        call.async_op = async_op
        return backend.combine(call)

    def combine_input(self, handle: Handle, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Memory for the rows of a combine, [M, H], which combine reads without a copy. Local.

        Its contents are undefined; the memory is lent until the tensor is gone.

        Raises:
            TypeError: ``dtype`` is not bfloat16 or float32.
            ValueError: a released or foreign handle.
        """
        backend = self._open()
        check_handle(handle, self._owner)
        if dtype not in (torch.bfloat16, torch.float32):
            raise TypeError(f"dtype: expected bfloat16 or float32, got {dtype}")
        return backend.combine_input(handle, dtype)

    # Memory and lifetime ------------------------------------------------------------------

    @staticmethod
    def explain_memory(
        *,
        num_ranks: int,
        ranks_per_node: int,
        hidden: int,
        num_experts: int,
        num_topk: int,
        max_tokens: int,
        layout: Layout = "rank",
        alignment: int = 1,
        quantize: Literal["fp8", "fp8_ue8m0"] | None = None,
        backend: Literal["cpu", "cuda"] = "cpu",
        fixed_rows: int | None = None,
        fabric: str = "auto",
        max_staging_bytes: int | None = None,
    ) -> MemoryReport:
        """Bytes a Buffer used like this may take on one rank, by purpose. Allocates nothing.

        The worst case for BF16 input and a BF16 wire: every rank sends ``max_tokens`` tokens, all
        of them to this rank. Windows of "cuda" are as large as the calls made so far needed, and a
        quarter more; ``fixed_rows`` bounds them. ``fabric`` and ``max_staging_bytes`` as for the
        Buffer.

        Raises:
            TypeError, ValueError: as making the Buffer and calling ``dispatch`` would.
        """
        if backend not in ("cpu", "cuda"):
            raise ValueError(f"backend: expected 'cpu' or 'cuda', got {backend!r}")
        config = Config(
            hidden, num_experts, num_topk, max_tokens, backend, max_staging_bytes=max_staging_bytes
        )
        check_int("num_ranks", num_ranks, 1, constants["limit_max_ranks"])
        check_int("ranks_per_node", ranks_per_node, 1, constants["limit_max_local_ranks"])
        check_config(config, num_ranks)
        check_fabric(fabric, backend)
        check_layout(layout)
        check_int("alignment", alignment, 1, constants["limit_max_alignment"])
        fmt = row_format(torch.bfloat16, quantize)
        check_row(fmt, hidden)
        if fixed_rows is not None:
            check_int("fixed_rows", fixed_rows, 0, 2**31 - 1)
        topology = make_topology(0, [0] * num_ranks, ranks_per_node)
        if backend == "cpu":
            return report_memory(config, topology, layout, alignment, fmt, fabric)
        # Imported here: a library without CUDA has no such part.
        from .cuda.memory_report import report_memory as report_cuda_memory

        return report_cuda_memory(config, topology, layout, alignment, fmt, fixed_rows, fabric)

    def check(self) -> None:
        """Wait for the calls made so far and raise what went wrong in one that did not wait.

        Such calls are CUDA's with ``fixed_rows``, cached dispatches and combines. Nothing is left
        to wait for on the CPU. Local.

        Raises:
            As ``dispatch``, for the first call that went wrong since the last error.
        """
        self._open().check()

    def timeline(self, *, restart: bool = False) -> Trace:
        """What this rank's last calls did, and when. Waits for the calls made so far. Local.

        "cuda": what thread blocks and warps did, and when each chunk for another node was put and
        waited for. "cpu": the phases of each call. With emulated network cards (on the CPU fabric
        "proxy/emulated") also each of their messages. What is not shown stands in the trace. A
        rank keeps a bounded number of spans and messages, the newest; how many older ones were
        lost stands there too.

        Args:
            restart: forget what the trace shows, so that the next one shows later calls only.

        Returns:
            This rank's trace; ``trace.save(path)`` writes it as Chrome JSON, and
            ``epcomm.timeline.merge`` makes one of all ranks'.

        Raises:
            TypeError: ``restart`` is not a bool.
            ValueError: the Buffer was made without ``timeline=True``.
            FabricError: emulated network cards on the GPU do not answer any more.
            BufferClosedError: the buffer is closed.
        """
        backend = self._open()
        if not isinstance(restart, bool):
            raise TypeError(f"restart: expected a bool, got {type(restart).__name__}")
        if not self._has_timeline:
            raise ValueError("timeline: this Buffer notes nothing; make it with timeline=True")
        return backend.timeline(restart=restart)

    def close(self) -> None:
        """Let go of the memory. Local: no rank waits, and results in use stay valid."""
        if self._backend is not None:
            self._backend.close()
            self._backend = None
            self._bootstrap.close()

    def __enter__(self) -> "Buffer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self) -> Backend:
        if self._backend is None:
            raise BufferClosedError("the buffer is closed")
        return self._backend


def _find_backend(name: str) -> Callable[[Bootstrap, Topology, Config, Options], Backend]:
    if name != "cuda":
        return CpuBackend
    try:
        from .cuda.backend import CudaBackend
    except ImportError as error:
        raise ValueError(f"backend: 'cuda' cannot be used here: {error}") from error
    return CudaBackend


def _is_timeout(timeout: Any) -> bool:
    return isinstance(timeout, int | float) and 0 < timeout < math.inf


def _check_options(timeout: Any, backend: Any, counts: dict[str, Any]) -> None:
    if not _is_timeout(timeout):
        raise ValueError(f"timeout: expected finite seconds > 0, got {timeout!r}")
    if backend not in ("auto", "cpu", "cuda"):
        raise ValueError(f"backend: expected 'auto', 'cpu' or 'cuda', got {backend!r}")
    for name, value in counts.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}: expected an int >= 1 or None, got {value!r}")


def _agree(bootstrap: Bootstrap, mine: Any, error: Exception | None) -> None:
    """Raise on every rank if any rank's arguments are refused or differ."""
    raise_together(bootstrap, error)
    reports = bootstrap.allgather(mine)
    different = [r for r, values in enumerate(reports) if values != reports[0]]
    if different:
        r = different[0]
        raise MismatchError(
            f"ranks disagree about the Buffer: rank 0 has {_words(reports[0])}, "
            f"rank {r} has {_words(reports[r])}",
            tuple(different),
        )


def _words(values: tuple[Config, int | None, str, str, bool]) -> str:
    config, ranks_per_node, backend, fabric, timeline = values
    return (
        f"{config}, ranks_per_node={ranks_per_node}, backend={backend!r}, fabric={fabric!r}, "
        f"timeline={timeline}"
    )
