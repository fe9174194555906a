"""The network between nodes: what it is called, the line it models, what it counted."""

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from epcomm.fabric.fabric import Fabric

from ..triggers import processor_ns

_Bytes = TypeVar("_Bytes", int, np.ndarray)


def is_modelled(fabric: str) -> bool:
    """Whether a fabric is an emulated network: its times are a model's."""
    return "emulated" in fabric.split(" ")[0]


def name_of(fabric: str) -> str:
    """For tables; a modelled network is called so wherever a number of it stands."""
    name = fabric.split(" ")[0]
    return f"{name} (modelled network)" if is_modelled(fabric) else name


@dataclass(frozen=True)
class Line:
    """What a rank's NICs can do, one way.

    Attributes:
        bytes_per_second: on the wire, headers included, all NICs of the rank together.
        latency: seconds.
        packet_bytes: payload of a packet.
        header_bytes: of a packet.
    """

    bytes_per_second: float
    latency: float
    packet_bytes: int
    header_bytes: int

    @classmethod
    def of(cls, traffic: np.ndarray) -> "Line":
        """The model that a fabric's ``traffic`` names."""
        rate = int(traffic["num_nics"]) * int(traffic["bytes_per_ns"]) * 1e9
        latency = int(traffic["latency_ns"]) * 1e-9
        return cls(rate, latency, int(traffic["packet_bytes"]), int(traffic["header_bytes"]))

    def wire_bytes(self, payload: _Bytes) -> _Bytes:
        """Of a message with so many bytes of payload; 0 for none."""
        packets = -(-payload // self.packet_bytes)
        return payload + packets * self.header_bytes

    def share(self, wire_bytes: int, seconds: float) -> float:
        """Part of the line's rate, 0 to 1."""
        return wire_bytes / seconds / self.bytes_per_second

    def ideal_seconds(self, wire_bytes: int) -> float:
        """Of a whole call: nothing but the bytes, and the latency of counts and of data."""
        return wire_bytes / self.bytes_per_second + 2 * self.latency


class Counters:
    """What the fabric of a buffer counts on this rank.

    Attributes:
        chunk_records: records of a message.
        num_chunks: messages to a node at most.
        description: what the transport chose, one line.
    """

    def __init__(self, buffer: Any) -> None:
        scale_out = buffer._backend._scale_out
        self._fabric: Fabric = scale_out.fabric
        self.chunk_records = int(scale_out.plan.chunking["chunk_records"])
        self.num_chunks = int(scale_out.plan.chunking["num_chunks"])
        self.description = self._fabric.describe()

    def proxy(self) -> np.ndarray:
        """Of the proxy threads so far: seconds of processor time, triggers taken."""
        busy_ns, triggers = processor_ns(self._fabric)
        return np.array([busy_ns * 1e-9, triggers], np.float64)

    def traffic(self, *, restart: bool = False) -> np.ndarray | None:
        """See Fabric.count."""
        return self._fabric.count(restart=restart)
