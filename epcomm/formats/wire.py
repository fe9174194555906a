"""The formats a row can travel in, and the bytes they take, as the C header defines them."""

import enum

from ..native import constants, library


class WireFormat(enum.IntEnum):
    """What the bytes of a row mean: ``epcomm_format``."""

    F32 = constants["FORMAT_F32"]
    BF16 = constants["FORMAT_BF16"]
    FP8 = constants["FORMAT_FP8"]
    """E4M3 with a float32 scale per tile of 128."""
    FP8_UE8M0 = constants["FORMAT_FP8_UE8M0"]
    """E4M3 with a power-of-two scale per tile of 128, four biased exponents to an int32."""
    LOGFMT8 = constants["FORMAT_LOGFMT8"]
    LOGFMT10 = constants["FORMAT_LOGFMT10"]

    @property
    def logfmt_bits(self) -> int:
        """Bits an element in a LogFMT format, 0 in the others."""
        return {WireFormat.LOGFMT8: 8, WireFormat.LOGFMT10: 10}.get(self, 0)

    def payload_bytes(self, hidden: int) -> int:
        """Bytes of a row's elements, without scales or padding."""
        _check_hidden(hidden)
        return library.epcomm_payload_bytes(self, hidden)

    def scale_bytes(self, hidden: int) -> int:
        """Bytes of a row's scales, or of its LogFMT metadata, without padding."""
        _check_hidden(hidden)
        return library.epcomm_scale_bytes(self, hidden)


def _check_hidden(hidden: int) -> None:
    if hidden < 1:
        raise ValueError(f"hidden must be at least 1, got {hidden}")
