"""How many SMs a rank needs: as many as its share of the memory's or the link's rate keeps busy.

Pure arithmetic over measured rates; :mod:`epcomm.cuda.rates` has them measured.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .rates import Rates

#: Part of the limiting rate that is enough. Near its limit a rate grows slowly with SMs, and the
#: last tenth would cost nearly as many as the half before it.
_ENOUGH = 0.9
#: SMs left to other kernels, among them the framework's copies.
_SPARE_SMS = 2
_FEWEST_SMS = 2
#: No rank takes more than one part in so many of a GPU unasked: the model computes there, too, and
#: other buffers come.
_MOST_PART = 4


@dataclass(frozen=True)
class Neighbourhood:
    """Who shares a GPU and a host.

    Attributes:
        on_gpu: ranks on this GPU.
        on_host: ranks on this host's GPUs.
        num_topk: K.
    """

    on_gpu: int
    on_host: int
    num_topk: int

    @property
    def copies(self) -> float:
        """Ranks of the host that a token goes to, if its K choices fall on any of them alike."""
        return self.on_host * (1.0 - (1.0 - 1.0 / self.on_host) ** self.num_topk)

    @property
    def leaving(self) -> float:
        """Part of the copies that go to another GPU."""
        return (self.on_host - self.on_gpu) / self.on_host


@dataclass(frozen=True)
class Demand:
    """SMs of a GPU for one of its ranks.

    Attributes:
        wanted: by the buffer being made; None: as many as are good.
        held: by the open buffers of the rank's process.
    """

    wanted: int | None
    held: int = 0


def share_of_sms(sms: int, on_gpu: int) -> int:
    """Most SMs that each of ``on_gpu`` ranks may hold unasked.

    The blocks of all of them must be resident together.
    """
    return max(1, min(sms // _MOST_PART, (sms - _SPARE_SMS) // on_gpu))


def free_share(sms: int, demands: Sequence[Demand]) -> int:
    """Most SMs for each rank of a GPU that wants no number of them; 1 also where none is left."""
    share = share_of_sms(sms, len(demands))
    modest = sum(demand.wanted is None for demand in demands)
    if modest:
        share = min(share, (sms - _SPARE_SMS - _taken(demands)) // modest)
    return max(1, share)


def check_sms(sms: int, share: int, demands: Sequence[Demand]) -> None:
    """Check that all blocks can be resident: they wait for each other.

    Raises:
        ValueError: they need more SMs than the GPU has.
    """
    total = _taken(demands) + share * sum(demand.wanted is None for demand in demands)
    held = sum(demand.held for demand in demands)
    if total > sms:
        others = f"; open buffers and network cards hold {held}" if held else ""
        raise ValueError(
            f"num_sms: the {len(demands)} ranks on this GPU need {total} SMs together, and it has "
            f"{sms}{others}. Their blocks wait for each other and must all be resident: pass a "
            "smaller num_sms to every Buffer, or close the buffers that are not needed"
        )


def _taken(demands: Sequence[Demand]) -> int:
    return sum(demand.held + (demand.wanted or 0) for demand in demands)


def limiting_rate(rates: Rates, where: Neighbourhood) -> float:
    """Bytes read and written per second, by all ranks of a GPU, that memory and link allow.

    A token is read once and written ``copies`` times. Where a part of those leaves over the link,
    everything can go no faster than that part: memory traffic 1 + copies, link traffic
    copies x leaving, per row.
    """
    if rates.link is None or where.leaving == 0.0:
        return rates.memory
    over_link = where.copies * where.leaving
    return min(rates.memory, rates.link * (1.0 + where.copies) / over_link)


def enough_sms(rates: Rates, where: Neighbourhood, share: int) -> int:
    """The fewest SMs per rank with which the ranks of a GPU reach nearly the limiting rate.

    Args:
        rates: measured.
        where: who shares the GPU.
        share: most SMs a rank may hold.

    Returns:
        2 to ``share`` (or ``share``, if that is less).
    """
    wanted = _ENOUGH * limiting_rate(rates, where)
    for sms in range(min(_FEWEST_SMS, share), share):
        reached = rates.at(sms * where.on_gpu)
        if reached >= wanted or math.isclose(reached, wanted):
            return sms
    return share
