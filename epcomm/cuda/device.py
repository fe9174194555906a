"""What a rank's GPU must offer, and how many of its SMs a rank may hold."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import torch

from ..bootstrap import Bootstrap, raise_together
from . import abi
from .calibrate import GpuProbe
from .rates import Place, agree_on_rates
from .sms import Neighbourhood, enough_sms, share_of_sms

_MPS_HINT = (
    "start the program with 'bash launch/gpu.sh', or start nvidia-cuda-mps-control -d before it"
)


@dataclass(frozen=True)
class Device:
    """This rank's GPU.

    Attributes:
        index: as torch counts them.
        num_sms: thread blocks a call of this rank uses, unless told otherwise.
        max_sms: SMs of the GPU.
    """

    index: int
    num_sms: int
    max_sms: int


def check_device(bootstrap: Bootstrap, num_sms: int | None, num_topk: int) -> Device:
    """Find this rank's GPU, choose its SMs and refuse what cannot work. Collective.

    Args:
        bootstrap: the ranks of a buffer.
        num_sms: that this rank's calls use; None: as many as its share of the GPU's memory and
            link rates keeps busy (see :mod:`epcomm.cuda.sms`).
        num_topk: K.

    Raises:
        RuntimeError: the library has no kernels, or there is no GPU, or several ranks share one
            without MPS.
        ValueError: the ranks of a GPU would need more SMs than it has.
        PeerError: another rank met one of these.
    """
    error: Exception | None = None
    host = socket.gethostname()
    identity, sms, index = "", 0, 0
    try:
        if not abi.available:
            raise RuntimeError(
                "backend 'cuda': libepcomm was built without CUDA; install nvcc and rebuild with "
                "EPCOMM_CUDA=1 pip install -e ."
            )
        if not torch.cuda.is_available():
            raise RuntimeError("backend 'cuda': torch finds no CUDA device")
        index = torch.cuda.current_device()
        properties = torch.cuda.get_device_properties(index)
        identity, sms = f"{host} {properties.uuid}", properties.multi_processor_count
    except RuntimeError as caught:
        error = caught
    raise_together(bootstrap, error)
    everyone = bootstrap.allgather((identity, num_sms, host))
    neighbours = [wanted for where, wanted, _ in everyone if where == identity]
    try:
        if len(neighbours) > 1 and not _mps_runs():
            raise RuntimeError(
                f"backend 'cuda': {len(neighbours)} ranks share a GPU without CUDA MPS; their "
                f"kernels would take turns instead of running together; {_MPS_HINT}"
            )
    except RuntimeError as caught:
        error = caught
    raise_together(bootstrap, error)
    default = 0
    if any(wanted is None for _, wanted, _ in everyone):
        rates = agree_on_rates(bootstrap, Place(identity, host, sms), GpuProbe(index, sms))
        on_host = sum(where == host for _, _, where in everyone)
        shared = Neighbourhood(len(neighbours), on_host, num_topk)
        default = enough_sms(rates, shared, share_of_sms(sms, len(neighbours)))
    mine = default if num_sms is None else num_sms
    try:
        total = sum(default if wanted is None else wanted for wanted in neighbours)
        if mine < 1 or total > sms:
            raise ValueError(
                f"num_sms: the {len(neighbours)} ranks on this GPU ask for {total} SMs together, "
                f"and it has {sms}; their blocks wait for each other and must all be resident"
            )
    except ValueError as caught:
        error = caught
    raise_together(bootstrap, error)
    return Device(index, mine, sms)


def _mps_runs() -> bool:
    pipes = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")
    return (Path(pipes) / "control").exists()
