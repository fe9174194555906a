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


class BufferClosedError(EpcommError):
    """The buffer was closed, or an earlier timeout left it unusable."""
