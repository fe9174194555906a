"""Memory of trigger rings that kernels fill."""

from cupy.cuda import runtime

from ..fabric.fabric import FabricOptions, RingMemory
from .memory import DeviceBlock, PinnedBlock


class DeviceRings:
    """Triggers and state in pinned memory, heads in device memory.

    Attributes:
        memory: for a Fabric with ``device_fills``.
    """

    def __init__(self, options: FabricOptions) -> None:
        host_bytes, producer_bytes = RingMemory.sizes(options)
        # Plain pinned memory, not write-combined: the proxy threads read it all the time. It lies
        # on the NUMA node of the thread that makes it.
        self._host = PinnedBlock(host_bytes)
        self._producers = DeviceBlock(producer_bytes)
        runtime.memset(self._producers.pointer, 0, self._producers.num_bytes)
        runtime.deviceSynchronize()
        self.memory = RingMemory(self._host.pointer, self._producers.pointer, self)

    def close(self) -> None:
        """Free the memory; the fabric is closed and no kernel uses it any more."""
        self._host.close()
        self._producers.close()
