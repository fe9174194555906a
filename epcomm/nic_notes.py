"""What a rank's emulated network cards tell for its timeline: messages, and what went wrong."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .fabric.abi import dtypes
from .fabric.fabric import Fabric
from .trace_events import (
    JsonObject,
    begins_of_messages,
    events_of_incidents,
    events_of_messages,
)


@dataclass(frozen=True)
class NicNotes:
    """Notes of one rank's cards, oldest first.

    Attributes:
        messages: ``epcomm_fabric_message``, structured array [n].
        incidents: ``epcomm_fabric_event``, structured array [m].
        lost_messages: older ones that were written over.
        lost_incidents: likewise.
    """

    messages: np.ndarray
    incidents: np.ndarray
    lost_messages: int = 0
    lost_incidents: int = 0

    @classmethod
    def read(cls, fabric: Fabric | None) -> "NicNotes":
        """Those that a fabric keeps; none without one.

        Raises:
            FabricError: network cards on the GPU do not answer.
        """
        if fabric is None:
            return cls(np.zeros(0, dtypes["message"]), np.zeros(0, dtypes["event"]))
        messages, num_messages = fabric.messages()
        incidents, num_incidents = fabric.events()
        return cls(
            messages, incidents, num_messages - len(messages), num_incidents - len(incidents)
        )

    @property
    def times(self) -> list[int]:
        """When each of them begins, nanoseconds."""
        begins: list[int] = begins_of_messages(self.messages).tolist()
        incidents: list[int] = self.incidents["time_ns"].tolist()
        return begins + incidents

    def trace_events(self, rank: int, rail: Sequence[int], base: int) -> list[JsonObject]:
        """As events of a Chrome trace.

        Args:
            rank: whose.
            rail: rank by node.
            base: nanoseconds that become 0.
        """
        return [
            *events_of_messages(self.messages, rank, rail, base),
            *events_of_incidents(self.incidents, rank, rail, base),
        ]
