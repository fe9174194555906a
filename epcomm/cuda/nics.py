"""SMs that a rank's emulated network cards take beside its kernels."""

#: A card of 50 GB/s needs what two blocks copy.
_SMS = 2
#: Whose cards are on the GPU: kernels post to them, or proxy threads.
_FABRICS = ("emulated", "proxy/emulated")


def nic_sms(fabric: str) -> int:
    """SMs of the rank's emulated cards, which stay resident as long as the buffer.

    Args:
        fabric: of back end "cuda", the name with options; ``blocks=`` is the one that says it.

    Returns:
        0 for other fabrics.

    Raises:
        ValueError: ``blocks`` is not a number of blocks.
    """
    name, *options = fabric.split()
    if name not in _FABRICS:
        return 0
    for option in options:
        key, _, value = option.partition("=")
        if key == "blocks":
            if not value.isdecimal() or int(value) < 1:
                raise ValueError(f"fabric: blocks: expected SMs, 1 or more, got {value!r}")
            return int(value)
    return _SMS


def with_nic_sms(fabric: str) -> str:
    """The fabric's options with ``blocks=`` among them where cards are emulated."""
    _, _, options = fabric.partition(" ")
    sms = nic_sms(fabric)
    if sms == 0 or "blocks=" in options:
        return options
    return f"{options} blocks={sms}".strip()
