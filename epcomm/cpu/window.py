"""What lies where in a window, and what memory a Buffer will take."""

from dataclasses import dataclass

from ..native import align, constants

_ALIGN = constants["limit_window_align"]


@dataclass(frozen=True)
class RowParts:
    """Byte offsets of the parts of M received rows; each part is one dense array.

    Attributes:
        x: payload, [M, H].
        scales: [M, scale bytes].
        topk: local expert ids, int64 [M, K]; layout rank only.
        weights: float32 [M, K] (layout rank) or [M] (layout expert).
        source: (rank, token), int32 [M, 2].
        nbytes: end of the last part.
    """

    x: int
    scales: int
    topk: int
    weights: int
    source: int
    nbytes: int


def dispatch_parts(
    rows: int, payload_bytes: int, scale_bytes: int, num_topk: int, by_expert: bool
) -> RowParts:
    """Lay out the window a dispatch is received in. The same on the owner and on the writers."""
    topk_bytes = 0 if by_expert else 8 * num_topk
    weight_bytes = 4 if by_expert else 4 * num_topk
    offsets = [0]
    for row_bytes in (payload_bytes, scale_bytes, topk_bytes, weight_bytes, 8):
        offsets.append(align(offsets[-1] + rows * row_bytes, _ALIGN))
    return RowParts(*offsets)


@dataclass(frozen=True)
class CombineParts:
    """Byte offsets of what a combine reads: rows [M, H], a weight per row, top-k weights."""

    x: int
    row_weights: int
    topk_weights: int
    nbytes: int


def combine_parts(rows: int, payload_bytes: int, num_topk: int, by_expert: bool) -> CombineParts:
    """Lay out the window a combine is read from."""
    topk_bytes = 4 if by_expert else 4 * num_topk
    offsets = [0]
    for row_bytes in (payload_bytes, 4, topk_bytes):
        offsets.append(align(offsets[-1] + rows * row_bytes, _ALIGN))
    return CombineParts(*offsets)
