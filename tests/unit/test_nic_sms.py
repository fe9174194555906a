"""SMs of emulated network cards, from the fabric's options."""

import pytest

from epcomm.cuda.nics import nic_sms, with_nic_sms


@pytest.mark.parametrize(
    ("fabric", "sms", "options"),
    [
        ("auto", 0, ""),
        ("proxy/local", 0, ""),
        ("proxy/verbs blocks=9", 0, "blocks=9"),
        ("emulated", 2, "blocks=2"),
        ("emulated rate=50", 2, "rate=50 blocks=2"),
        ("emulated blocks=3 rate=50", 3, "blocks=3 rate=50"),
        ("proxy/emulated", 2, "blocks=2"),
        ("proxy/emulated blocks=5 seed=1", 5, "blocks=5 seed=1"),
    ],
)
def test_options_say_how_many(fabric, sms, options):
    assert nic_sms(fabric) == sms
    assert with_nic_sms(fabric) == options


@pytest.mark.parametrize("fabric", ["emulated", "proxy/emulated"])
@pytest.mark.parametrize("value", ["", "0", "-1", "two"])
def test_no_number_is_refused(value, fabric):
    with pytest.raises(ValueError, match="blocks"):
        nic_sms(f"{fabric} blocks={value}")
