"""What calls alike have in common, worked out once: kernels' parameters, and where rows lie."""

import ctypes
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .. import native
from ..backend import CombineCall, DispatchCall
from ..formats.wire import WireFormat
from ..native import constants
from . import abi
from .routes import Routes, Shape

#: What a buffer remembers of each kind; callers that never repeat a call gain nothing.
_REMEMBERED = 64
#: Bytes of rows in flight that keep an SM's part of the memory's rate, and the fewest warps that
#: keep up with them, where the calls hold nearly all SMs of a GPU.
_ENOUGH_UNDER_WAY, _FEWEST_WARPS = 56 * 1024, 4
#: Formats of rows as the caller has them.
FORMATS = {torch.float32: WireFormat.F32, torch.bfloat16: WireFormat.BF16}
_ROW_DTYPE: dict[int, torch.dtype] = {
    WireFormat.F32: torch.float32,
    WireFormat.BF16: torch.bfloat16,
    WireFormat.FP8: torch.float8_e4m3fn,
    WireFormat.FP8_UE8M0: torch.float8_e4m3fn,
}
_LAYOUTS = {"rank": constants["LAYOUT_RANK"], "expert": constants["LAYOUT_EXPERT"]}


@dataclass(frozen=True)
class Tuning:
    """How kernels are laid out on the GPU.

    Attributes:
        num_sms: thread blocks of a call; all must be resident at once.
        memory_limits: whether the ranks' calls together make so many copies with so many SMs of
            their GPU that memory limits a dispatch.
        dispatch_warps, packing_warps: warps of a dispatch block that moves rows as they are, or
            packs them to FP8; at most.
        dispatch_stages: rows in flight per warp, fewer where they do not fit.
        combine_warps: warps of a combine block.
    """

    num_sms: int = 16
    memory_limits: bool = False
    dispatch_warps: int = 8
    packing_warps: int = 14
    dispatch_stages: int = 2
    combine_warps: int = 20

    def moving_warps(self, row_bytes: int) -> int:
        """Warps of a dispatch block that moves rows of ``row_bytes`` as they are."""
        if not self.memory_limits:
            return self.dispatch_warps
        # More under way than memory needs only lets ranks, and warps, end further apart.
        needed = -(-_ENOUGH_UNDER_WAY // (self.dispatch_stages * row_bytes))
        return max(_FEWEST_WARPS, min(needed, self.dispatch_warps))


@dataclass(frozen=True)
class Agreed:
    """Arguments of a call that all ranks must share; numbers as in the protocol's enumerators."""

    op: int
    format: int
    layout: int
    alignment: int = 1
    with_weights: bool = False
    fixed_rows: int = -1
    wire: int = 0


class Block:
    """A kernel's parameters, kept for calls alike: a launch copies them, so the next may change.

    Attributes:
        call: the structure.
        announcement: in it.
        address: of it.
        follows: number of the dispatch whose routes are in it; 0: none.
    """

    def __init__(self, name: str, world: Any, agreed: Agreed, num_blocks: int) -> None:
        self.call = abi.structures[name](world=world, num_blocks=num_blocks)
        self.announcement = self.call.announcement
        self.address = ctypes.addressof(self.call)
        self.follows = 0
        for field, value in vars(agreed).items():
            setattr(self.announcement, field, value)

    def follow(self, routes: Routes, handle: int) -> None:
        """Fill in routes, unless they are there, and what is announced of them.

        Args:
            routes: of the call.
            handle: number of the dispatch that made them; 0: this one does. So the same for all
                calls of this block with these routes.
        """
        if self.follows == routes.number:
            return
        self.announcement.num_tokens = routes.num_tokens
        self.announcement.handle_epoch = handle
        self.call.routes = routes.block
        self.follows = routes.number


class Parts(NamedTuple):
    """Offsets in a window, and bytes in all; as ``epcomm_cuda_parts``, but quick to read."""

    rows: int
    scales: int
    topk_idx: int
    topk_weights: int
    source: int
    bytes: int


class DispatchForm:
    """Dispatches alike in all but tensors and routes.

    Attributes:
        agreed: what all ranks must share.
        by_expert: layout "expert".
        x_dtype, scales_dtype: of an output row; no scales: None.
        scale_words: of a row, 4 bytes each.
        row_bytes: of an output row and its scales.
        max_dests: D, copies of a token at most.
        first: whether routes have to be found; a cached dispatch has them.
        layout: parameters of the kernel that finds them; None: there is none, or need not be.
        block: parameters of the dispatch kernel.
    """

    def __init__(self, forms: "Forms", agreed: Agreed, input_format: int) -> None:
        shape, tuning, hidden = forms.shape, forms.tuning, forms.hidden
        sizes = native.library
        self.agreed = agreed
        self._row = row = abi.structures["row"](
            row_bytes=sizes.epcomm_payload_bytes(agreed.format, hidden),
            scale_bytes=sizes.epcomm_scale_bytes(agreed.format, hidden),
            num_topk=shape.num_topk,
            layout=agreed.layout,
            with_topk=True,
            with_weights=agreed.with_weights,
        )
        self.x_dtype = _ROW_DTYPE[agreed.format]
        self.scale_words: int = row.scale_bytes // 4
        ue8m0 = agreed.format == WireFormat.FP8_UE8M0
        self.scales_dtype = torch.int32 if ue8m0 else torch.float32
        self.row_bytes: int = row.row_bytes + row.scale_bytes
        self._parts: dict[int, Parts] = {}
        self.by_expert = agreed.layout == constants["LAYOUT_EXPERT"]
        self.max_dests = shape.num_topk
        if not self.by_expert and shape.topology.num_nodes == 1:
            self.max_dests = min(shape.num_topk, shape.num_ranks)
        self.first = agreed.op == constants["OP_DISPATCH"]
        self.layout: Block | None = None
        if self.first and shape.topology.num_nodes > 1:
            self.layout = Block("layout", forms.world, agreed, tuning.num_sms)
            self.layout.call.row = row
        self.block = Block("dispatch", forms.world, agreed, tuning.num_sms)
        call = self.block.call
        call.row, call.announce = row, not self.first
        call.row_in_bytes = sizes.epcomm_payload_bytes(input_format, hidden)
        call.input_format = input_format
        packs = input_format != agreed.format
        if packs:
            call.num_warps = tuning.packing_warps
        elif self.first:  # which counts and places besides
            call.num_warps = tuning.dispatch_warps
        else:
            call.num_warps = tuning.moving_warps(call.row_in_bytes)
        call.stages = tuning.dispatch_stages

    def parts(self, num_rows: int) -> Parts:
        """Where the parts of ``num_rows`` rows lie in a window."""
        parts = self._parts.get(num_rows)
        if parts is None:
            found = abi.structures["parts"]()
            native.library.epcomm_cuda_window_parts(
                ctypes.addressof(self._row), num_rows, ctypes.addressof(found)
            )
            parts = Parts(*(getattr(found, name) for name in Parts._fields))
            _remember(self._parts, num_rows, parts)
        return parts


class CombineForm:
    """Combines alike in all but tensors and routes.

    Attributes:
        agreed: what all ranks must share.
        row_bytes: of a row.
        block: parameters of the kernel.
        places: offsets in the window and addresses of biases that are in it.
    """

    def __init__(self, forms: "Forms", agreed: Agreed) -> None:
        self.agreed = agreed
        self.row_bytes: int = native.library.epcomm_payload_bytes(agreed.format, forms.hidden)
        self.block = Block("combine", forms.world, agreed, forms.tuning.num_sms)
        call = self.block.call
        call.row_bytes, call.layout = self.row_bytes, agreed.layout
        call.num_threads = 32 * forms.tuning.combine_warps
        self.places: tuple[Any, ...] = ()


class Forms:
    """The forms of a buffer's calls, each made once.

    Args:
        shape: of the buffer.
        hidden: H.
        world: ``epcomm_cuda_world``.
        tuning: of all calls.
    """

    def __init__(self, shape: Shape, hidden: int, world: Any, tuning: Tuning) -> None:
        self.shape, self.hidden, self.world, self.tuning = shape, hidden, world, tuning
        self._dispatches: dict[tuple[Any, ...], DispatchForm] = {}
        self._combines: dict[tuple[Any, ...], CombineForm] = {}

    def of_dispatch(self, call: DispatchCall) -> DispatchForm:
        """The form of a dispatch."""
        packed = call.scales is not None
        input_format = call.format if packed else FORMATS[call.x.dtype]
        weighted = call.topk_weights is not None
        first = call.handle is None
        key = (first, input_format, call.format, call.layout, call.alignment, call.fixed_rows,
               weighted)  # fmt: skip
        form = self._dispatches.get(key)
        if form is None:
            agreed = Agreed(
                op=constants["OP_DISPATCH" if first else "OP_CACHED_DISPATCH"],
                format=call.format,
                layout=_LAYOUTS[call.layout],
                alignment=call.alignment,
                with_weights=weighted,
                fixed_rows=-1 if call.fixed_rows is None else call.fixed_rows,
            )
            form = DispatchForm(self, agreed, input_format)
            _remember(self._dispatches, key, form)
        return form

    def of_combine(self, call: CombineCall) -> CombineForm:
        """The form of a combine."""
        key = (call.x.dtype, call.handle.layout, call.topk_weights is not None, call.wire)
        form = self._combines.get(key)
        if form is None:
            dtype, layout, weighted, wire = key
            agreed = Agreed(
                op=constants["OP_COMBINE"],
                format=FORMATS[dtype],
                layout=_LAYOUTS[layout],
                with_weights=weighted,
                wire=wire,
            )
            form = CombineForm(self, agreed)
            _remember(self._combines, key, form)
        return form


def _remember(known: dict[Any, Any], key: Any, value: Any) -> None:
    """Add to what is known, which does not grow without end."""
    if len(known) == _REMEMBERED:
        known.clear()
    known[key] = value
