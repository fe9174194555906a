"""epcomm itself, as a case to time."""

from collections.abc import Callable
from typing import Any, Literal, cast

import torch

from epcomm import Buffer
from epcomm.results import CombineResult, DispatchResult, Layout

from .options import Shape
from .workload import Inputs

Quantize = Literal["fp8", "fp8_ue8m0"]
Wire = Literal["bf16", "logfmt8", "logfmt10"]


class EpcommCase:
    """Dispatch, combine, and combine of rows the experts wrote into epcomm's memory.

    Attributes:
        name: for the tables.
        phases: seconds by phase of the last call.
        y_MH: what combine sends back, bfloat16, in the order of the received rows.
        received: result of the last dispatch.
        returned: result of the last combine.

    """

    name = "epcomm"

    def __init__(self, comm: Any, shape: Shape, inputs: Inputs) -> None:
        self.phases: dict[str, float] = {}
        self.y_MH = inputs.x_TH[:0]
        self.received: DispatchResult | None = None
        self.returned: CombineResult | None = None
        self._in_place: torch.Tensor | None = None
        self._shape = shape
        self._inputs = inputs
        self._buffer = Buffer(
            comm,
            hidden=shape.hidden,
            num_experts=shape.experts,
            num_topk=shape.topk,
            max_tokens=shape.tokens,
            ranks_per_node=shape.ranks_per_node,
        )

    def prepare(self, step: str) -> None:
        """Give back the previous results' memory; put the rows where the experts would have."""
        self.returned = None
        if step == "dispatch":
            self.received = self._in_place = None
        elif step == "combine in place":
            assert self.received is not None
            self._in_place = self._buffer.combine_input(self.received.handle)
            self._in_place.copy_(self.y_MH)

    def steps(self) -> dict[str, Callable[[], object]]:
        """Dispatch, then combine both ways."""
        return {
            "dispatch": self.dispatch,
            "combine": lambda: self.combine(self.y_MH),
            "combine in place": lambda: self.combine(cast(torch.Tensor, self._in_place)),
        }

    def dispatch(self) -> None:
        """Send BF16 rows, packed on the way as the shape says."""
        fmt = self._shape.dispatch_format
        self.received = self._buffer.dispatch(
            self._inputs.x_TH,
            self._inputs.topk_idx_TK,
            self._inputs.topk_weights_TK,
            quantize=None if fmt == "bf16" else cast(Quantize, fmt),
            layout=cast(Layout, self._shape.layout),
        )
        self.phases = self.received.phases

    def combine(self, y_MH: torch.Tensor) -> None:
        """Bring ``y_MH`` home."""
        assert self.received is not None
        wire = cast(Wire, self._shape.combine_format)
        self.returned = self._buffer.combine(y_MH, self.received.handle, wire=wire)
        self.phases = self.returned.phases

    def close(self) -> None:
        """Give all memory back."""
        self.received = self.returned = self._in_place = None
        self._buffer.close()
