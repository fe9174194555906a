"""Byte accounting: what a call moved over which link, and what other schemes would have moved."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LinkTraffic:
    """What one rank sent over one kind of link in one call.

    Attributes:
        messages: scale-out: messages posted, credits among them. Scale-up: rows stored to
            (dispatch) or read from (combine) another rank's memory.
        payload_bytes: rows, with their scales.
        metadata_bytes: everything else: ids, indices, weights, padding, announcements.
    """

    messages: int = 0
    payload_bytes: int = 0
    metadata_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.payload_bytes + self.metadata_bytes

    def __add__(self, other: "LinkTraffic") -> "LinkTraffic":
        return LinkTraffic(
            self.messages + other.messages,
            self.payload_bytes + other.payload_bytes,
            self.metadata_bytes + other.metadata_bytes,
        )


@dataclass(frozen=True)
class LinkBytes:
    """Payload bytes another scheme would have moved for the same tokens."""

    scale_up: int = 0
    scale_out: int = 0


@dataclass(frozen=True)
class Traffic:
    """What this rank moved in one call.

    Rows that stay on their own rank cross no link and are not counted.

    Attributes:
        scale_up: to or from ranks of the same node.
        scale_out: to other nodes.
        records: scale-out rows: one per (token, other node).
        alternatives: payload bytes of the same tokens sent by this rank otherwise:
            ``per_rank`` one row per (token, rank), a flat all-to-all in the same format;
            ``per_expert`` one row per (token, expert); ``per_rank_bf16`` a flat all-to-all of
            BF16 rows; ``per_node_bf16`` this protocol with BF16 rows.
    """

    scale_up: LinkTraffic = LinkTraffic()
    scale_out: LinkTraffic = LinkTraffic()
    records: int = 0
    alternatives: dict[str, LinkBytes] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)
