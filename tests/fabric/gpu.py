"""A rank's memory on a GPU, and a fabric whose producers are kernels."""

from typing import Any

import numpy as np
from cupy.cuda import runtime

from epcomm.cuda.memory import DeviceBlock, PinnedBlock
from epcomm.errors import FabricError
from epcomm.fabric.abi import Place, constants, dtypes
from epcomm.fabric.fabric import Fabric, RegionMemory
from epcomm.native import library

_HOST_TO_DEVICE, _DEVICE_TO_HOST = 1, 2


class GpuBytes:
    """Device memory that is read and written in slices, as an array of bytes is."""

    def __init__(self, pointer: int, nbytes: int) -> None:
        self._pointer, self._nbytes = pointer, nbytes

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self._nbytes)
        into = np.empty(stop - start, np.uint8)
        runtime.memcpy(into.ctypes.data, self._pointer + start, into.nbytes, _DEVICE_TO_HOST)
        return into

    def __setitem__(self, part: slice, data: np.ndarray) -> None:
        start, stop, _ = part.indices(self._nbytes)
        assert stop - start == data.nbytes
        runtime.memcpy(self._pointer + start, data.ctypes.data, data.nbytes, _HOST_TO_DEVICE)

    def any(self) -> bool:
        return bool(self[:].any())


class GpuMemory:
    """Zeros on GPU 0 that another process can map."""

    def __init__(self, nbytes: int) -> None:
        runtime.setDevice(0)
        self._block = DeviceBlock(nbytes)
        runtime.memset(self._block.pointer, 0, self._block.num_bytes)
        runtime.deviceSynchronize()
        self.array = GpuBytes(self._block.pointer, nbytes)
        self.region = RegionMemory(self._block.pointer, nbytes, self._block, device=0)

    def counter(self, index: int) -> int:
        return int(self.array[8 * index : 8 * index + 8].view(np.uint64)[0])


class KernelFabric:
    """The calls of ``Fabric``, each made by a kernel; for transports that are direct."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fabric, name)

    def run(self, calls: list[dict[str, Any]], timeout: float = 0.0) -> list[int]:
        """By one thread, one after another; what each returned."""
        item = dtypes["call"].itemsize
        block = PinnedBlock(len(calls) * (item + 8))
        try:
            told = block.array(0, (len(calls),), dtypes["call"])
            results = block.array(len(calls) * item, (len(calls),), np.uint64)
            for one, call in zip(told, calls, strict=True):
                for name, value in call.items():
                    raw = (
                        np.frombuffer(bytes(value), np.uint8) if isinstance(value, Place) else value
                    )
                    one[name] = raw
            all_calls = np.zeros((), dtypes["ibgda_calls"])
            all_calls["ibgda"] = np.frombuffer(self._fabric.ibgda or b"", np.uint8)
            all_calls["calls"], all_calls["results"] = told.ctypes.data, results.ctypes.data
            all_calls["count"], all_calls["timeout_ns"] = len(calls), int(timeout * 1e9)
            assert library.epcomm_fabric_probe_calls(all_calls.ctypes.data, None) == 0
            runtime.deviceSynchronize()
            return list(results.tolist())
        finally:
            block.close()

    def put(self, lane: tuple[int, int], remote: Place, local: Place, nbytes: int) -> int:
        return self.run([_call("PUT", lane, remote=remote, local=local, bytes=nbytes)])[0]

    def put_signal(
        self, lane: tuple[int, int], remote: Place, local: Place, nbytes: int, signal: int
    ) -> int:
        return self.put_signals([(lane, remote, local, nbytes, signal)])[0]

    def put_signals(self, puts: list[tuple[tuple[int, int], Place, Place, int, int]]) -> list[int]:
        return self.run(
            [
                _call("PUT_SIGNAL", lane, remote=remote, local=local, bytes=nbytes, signal=signal)
                for lane, remote, local, nbytes, signal in puts
            ]
        )

    def signal_add(self, lane: tuple[int, int], signal: int, value: int) -> int:
        return self.run([_call("SIGNAL_ADD", lane, signal=signal, value=value)])[0]

    def done(self, channel: int, ticket: int) -> bool:
        return bool(self.run([_call("CALL_DONE", (0, channel), value=ticket)])[0])

    def flush(self, channel: int, timeout: float) -> None:
        if self.run([_call("CALL_FLUSH", (0, channel))], timeout)[0]:
            return
        self.check()
        raise FabricError(f"channel {channel} is not quiet after {timeout:g} s")

    def check(self) -> None:
        """As who waits on a GPU does: look at the queues, which nobody else looks at."""
        world = self._fabric.topology
        peers = [node for node in range(world.num_nodes) if node != world.node]
        channels = range(self._fabric.options.num_channels)
        self.run([_call("CALL_LOOK", (peer, channel)) for peer in peers for channel in channels])
        self._fabric.check()


def _call(what: str, lane: tuple[int, int], **fields: Any) -> dict[str, Any]:
    return {"what": constants[what], "peer": lane[0], "channel": lane[1], **fields}
