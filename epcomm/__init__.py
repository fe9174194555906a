"""Expert-parallel dispatch and combine for Mixture-of-Experts models."""

from .buffer import Buffer
from .errors import (
    BufferClosedError,
    EpcommError,
    FabricError,
    MismatchError,
    PeerError,
    PeerTimeoutError,
)
from .results import (
    CombineResult,
    DispatchLayout,
    DispatchResult,
    Event,
    Handle,
    MemoryReport,
)
from .traffic import LinkBytes, LinkTraffic, Traffic
from .version import __version__

__all__ = [
    "Buffer",
    "BufferClosedError",
    "CombineResult",
    "DispatchLayout",
    "DispatchResult",
    "EpcommError",
    "Event",
    "FabricError",
    "Handle",
    "LinkBytes",
    "LinkTraffic",
    "MemoryReport",
    "MismatchError",
    "PeerError",
    "PeerTimeoutError",
    "Traffic",
    "__version__",
]
