"""Records that cross between nodes: how many from whom to whom, in which messages."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..options import Shape
from .network import Line


def count_records(topk_idx_TK: torch.Tensor, shape: Shape, rank: int) -> np.ndarray:
    """Records of ``rank`` by destination node, int64 [N]: one for each token that goes there.

    None goes to the own node. No exchange that gives every node its tokens sends fewer.
    """
    node_TK = torch.div(topk_idx_TK, shape.experts // shape.nodes, rounding_mode="floor")
    there = [int((node_TK == node).any(dim=1).sum()) for node in range(shape.nodes)]
    there[rank // shape.ranks_per_node] = 0
    return np.array(there, np.int64)


@dataclass(frozen=True)
class Crossing:
    """The records of a dispatch, and of the combine that brings them back.

    Attributes:
        out_RN: int64 [R, N], from a rank to a node; they go to its rail peer there.
    """

    out_RN: np.ndarray

    @classmethod
    def of(cls, comm: Any, shape: Shape, topk_idx_TK: torch.Tensor) -> "Crossing":
        """Of the ranks' routings. Collective."""
        return cls(np.stack(comm.allgather(count_records(topk_idx_TK, shape, comm.rank))))

    @property
    def total(self) -> int:
        """Records of all ranks."""
        return int(self.out_RN.sum())

    @property
    def back_RN(self) -> np.ndarray:
        """What a rank gets from a node, which it sends back there in a combine."""
        ranks, nodes = self.out_RN.shape
        out_NLN = self.out_RN.reshape(nodes, ranks // nodes, nodes)
        return out_NLN.transpose(2, 1, 0).reshape(ranks, nodes)

    def messages(self, chunk_records: int) -> int:
        """The most chunks that a rank sends or gets."""
        chunks_RN = -(-self.out_RN // chunk_records)
        back_RN = -(-self.back_RN // chunk_records)
        return int(max(chunks_RN.sum(axis=1).max(), back_RN.sum(axis=1).max()))

    def busiest_bytes(self, record_bytes: int, chunk_records: int, line: Line) -> int:
        """Wire bytes of records, headers included, of the rank that sends or gets the most."""
        chunk = line.wire_bytes(chunk_records * record_bytes)

        def largest(records_RN: np.ndarray) -> int:
            rest_RN = line.wire_bytes(records_RN % chunk_records * record_bytes)
            return int((records_RN // chunk_records * chunk + rest_RN).sum(axis=1).max())

        return max(largest(self.out_RN), largest(self.back_RN))
