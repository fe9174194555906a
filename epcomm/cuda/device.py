"""What a rank's GPU must offer, and how many of its SMs a rank may hold."""

import socket
from collections import Counter
from dataclasses import dataclass

import torch

from ..bootstrap import Bootstrap, raise_together
from .calibrate import GpuProbe
from .rates import Place, agree_on_rates
from .requirements import check_driver, check_gpu, check_sharing, debug_delay_ns
from .sms import Demand, Neighbourhood, check_sms, enough_sms, free_share

#: Copies of a token times the part of a GPU's SMs that make them: from here on its memory cannot
#: keep up with bulk copies. Few warps are then enough, as measured for 5.3 copies by 128 SMs of
#: 132; for 3.6 by as many they are not.
_MOST_COPIES = 4.5
#: SMs that the open buffers of this process hold, by GPU.
_claimed: Counter[str] = Counter()


@dataclass(frozen=True)
class Device:
    """This rank's GPU.

    Attributes:
        index: as torch counts them.
        identity: the same text for ranks that use the same GPU.
        num_sms: thread blocks a call of this rank uses, held from now on.
        max_sms: SMs of the GPU.
        beside: SMs held for what runs beside the rank's calls.
        sms_of_calls: thread blocks of a call of all ranks on the GPU together.
        copies: of a token that goes to any ranks of the host alike.
        copies_in_bulk: whether it has the bulk copy engine.
    """

    index: int
    identity: str
    num_sms: int
    max_sms: int
    beside: int = 0
    sms_of_calls: int = 0
    copies: float = 1.0
    copies_in_bulk: bool = True

    @property
    def memory_limits(self) -> bool:
        """Whether so many SMs make so many copies that the GPU's memory limits a dispatch."""
        made = self.copies * self.sms_of_calls / self.max_sms
        return self.copies_in_bulk and made >= _MOST_COPIES

    def release(self) -> None:
        """Give the SMs back to other buffers of this process; once."""
        _claimed[self.identity] -= self.num_sms + self.beside


def check_device(
    bootstrap: Bootstrap, num_sms: int | None, num_topk: int, beside: int = 0
) -> Device:
    """Find this rank's GPU, refuse what cannot work, and hold SMs of it. Collective.

    Args:
        bootstrap: the ranks of a buffer.
        num_sms: that this rank's calls use; None: as many as its share of the GPU's memory and
            link rates keeps busy (see :mod:`epcomm.cuda.sms`).
        num_topk: K.
        beside: SMs of this rank's emulated network cards.

    Raises:
        RuntimeError: the library has no kernels (for this GPU), the driver is too old, there is no
            GPU, or several ranks share one without MPS.
        ValueError: the buffers of all ranks on a GPU would need more SMs than it has.
        PeerError: another rank met one of these.
    """
    error: Exception | None = None
    host = socket.gethostname()
    identity, sms, index, bulk = "", 0, 0, False
    try:
        debug_delay_ns()
        check_driver()
        index = check_gpu()
        properties = torch.cuda.get_device_properties(index)
        identity, sms = f"{host} {properties.uuid}", properties.multi_processor_count
        bulk = properties.major >= 9
    except (RuntimeError, ValueError) as caught:
        error = caught
    raise_together(bootstrap, error)
    everyone = bootstrap.allgather((identity, host, Demand(num_sms, _claimed[identity] + beside)))
    demands = [demand for where, _, demand in everyone if where == identity]
    try:
        check_sharing(len(demands))
    except RuntimeError as caught:
        error = caught
    raise_together(bootstrap, error)
    share = free_share(sms, demands)
    on_host = sum(where == host for _, where, _ in everyone)
    neighbourhood = Neighbourhood(len(demands), on_host, num_topk)
    if any(demand.wanted is None for _, _, demand in everyone):
        rates = agree_on_rates(bootstrap, Place(identity, host, sms), GpuProbe(index, sms))
        share = enough_sms(rates, neighbourhood, share)
    try:
        check_sms(sms, share, demands)
    except ValueError as caught:
        error = caught
    raise_together(bootstrap, error)
    mine = share if num_sms is None else num_sms
    _claimed[identity] += mine + beside
    return Device(
        *(index, identity, mine, sms, beside),
        sms_of_calls=sum(demand.wanted or share for demand in demands),
        copies=neighbourhood.copies,
        copies_in_bulk=bulk,
    )
