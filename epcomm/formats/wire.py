"""The formats a row can travel in, and the bytes they take."""

import enum

from .constants import logfmt_code_bytes, tiles_of


class WireFormat(enum.IntEnum):
    """What the bytes of a row mean; the values are those of ``epcomm_format`` in C."""

    F32 = 0
    BF16 = 1
    FP8 = 2
    """E4M3 with a float32 scale per tile of 128."""
    FP8_UE8M0 = 3
    """E4M3 with a power-of-two scale per tile of 128, four biased exponents to an int32."""
    LOGFMT8 = 4
    LOGFMT10 = 5

    @property
    def logfmt_bits(self) -> int:
        """Bits an element in a LogFMT format, 0 in the others."""
        return {WireFormat.LOGFMT8: 8, WireFormat.LOGFMT10: 10}.get(self, 0)

    def payload_bytes(self, hidden: int) -> int:
        """Count the bytes of a row's elements, without scales or padding."""
        _check_hidden(hidden)
        if self.logfmt_bits:
            return logfmt_code_bytes(hidden, self.logfmt_bits)
        return hidden * {WireFormat.F32: 4, WireFormat.BF16: 2}.get(self, 1)

    def scale_bytes(self, hidden: int) -> int:
        """Count the bytes of a row's scales, or of its LogFMT metadata, without padding."""
        _check_hidden(hidden)
        if self in (WireFormat.F32, WireFormat.BF16):
            return 0
        if self is WireFormat.FP8_UE8M0:
            return 4 * -(-tiles_of(hidden) // 4)
        return 4 * tiles_of(hidden)


def _check_hidden(hidden: int) -> None:
    if hidden < 1:
        raise ValueError(f"hidden must be at least 1, got {hidden}")
