"""The floor: what the machine's memory allows, measured in the same run."""

from collections.abc import Callable

import numpy as np

from epcomm.formats.wire import WireFormat

from .options import Shape

#: Bytes a copy reads, and writes, per rank: far more than a core's share of the caches.
COPY_BYTES = 64 * 2**20


class CopyCase:
    """All ranks copying at once, each within its own memory."""

    name = "copy"

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self._from = np.ones(COPY_BYTES, np.uint8)
        self._to = np.zeros(COPY_BYTES, np.uint8)

    def prepare(self, step: str) -> None:
        """Nothing precedes a copy."""

    def steps(self) -> dict[str, Callable[[], object]]:
        """One step."""
        return {"copy": lambda: np.copyto(self._to, self._from)}


def row_bytes(wire_format: str, hidden: int) -> int:
    """Bytes of a row and its scales as the receiver gets them, without metadata."""
    fmt = WireFormat[wire_format.upper()]
    return fmt.payload_bytes(hidden) + fmt.scale_bytes(hidden)


def least_bytes(shape: Shape, step: str, rows: int) -> int:
    """Bytes that all ranks together must read and write, each once, in a step.

    Dispatch reads every token and writes every received row; combine reads every row and writes
    every token. ``rows`` counts what all ranks receive together.
    """
    tokens = shape.tokens * shape.ranks * 2 * shape.hidden
    received = shape.dispatch_format if step == "dispatch" else "bf16"
    return tokens + rows * row_bytes(received, shape.hidden)
