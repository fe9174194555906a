"""The exceptions epcomm raises.

Wrong arguments are ``ValueError`` or ``TypeError``; the classes here are for what only a
collective call can meet. All of them derive from :class:`EpcommError`.
"""


class EpcommError(RuntimeError):
    """Base class of the errors that concern more than one rank."""


class PeerError(EpcommError):
    """Another rank refused the same call; nothing was sent and the buffer stays usable.

    Attributes:
        ranks: the ranks that refused.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks


class MismatchError(PeerError):
    """The ranks disagree about an argument that must be the same everywhere."""


class PeerTimeoutError(EpcommError, TimeoutError):
    """A rank stayed silent past the deadline, or its process is gone. The buffer is unusable.

    Attributes:
        ranks: the silent ranks.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks


class FabricError(EpcommError, ConnectionError):
    """The fabric between nodes failed: a transport, a proxy thread or a full ring.

    Attributes:
        ranks: the rank at the other end, if the failure concerns one.
        status: the kind of failure (``epcomm_fabric_status``).
        vendor: the transport's own code, such as a work completion's status.
    """

    def __init__(
        self, message: str, ranks: tuple[int, ...] = (), status: int = 0, vendor: int = 0
    ) -> None:
        super().__init__(message)
        self.ranks = ranks
        self.status = status
        self.vendor = vendor


class BufferClosedError(EpcommError):
    """The buffer was closed, or an earlier timeout left it unusable."""
