"""Second hop of dispatch: the rail peer stores the records of another node in its own node."""

from typing import NamedTuple

import numpy as np

from .memory import f32_at, fence, i32_at, kernel
from .store import Row, Rows, store_row


class Inbox(NamedTuple):
    """Records received from one source, back to back from ``address``."""

    address: int
    scales: int
    meta: int
    expert: int
    row: int
    weight: int
    bytes: int


@kernel
def forward_records(
    items: np.ndarray,
    inbox: Inbox,
    rows: Rows,
    base_E: np.ndarray,
    expert_CK: np.ndarray,
    row_CK: np.ndarray,
) -> None:
    """Store the row of each record in ``items`` (int32 indices) at the ranks it names.

    ``expert_CK`` and ``row_CK`` (int32) receive the choices and the rows they got here: what the
    reduction on the way back needs.
    """
    num_topk = expert_CK.shape[1]
    for i in items:
        at = inbox.address + i * inbox.bytes
        origin = i32_at(at + inbox.meta + 8, 2)
        expert_CK[i] = i32_at(at + inbox.expert, num_topk)
        row = Row(
            at,
            at + inbox.scales,
            expert_CK[i],
            i32_at(at + inbox.row, num_topk),
            f32_at(at + inbox.weight, num_topk),
            origin[0],
            origin[1],
        )
        store_row(rows, base_E, row, row_CK[i])
    fence()
