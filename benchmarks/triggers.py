"""Trigger rings and proxy threads: rate, round trip, latency to a peer's counter, processor time.

    bash launch/mpirun.sh 2 -m benchmarks.triggers               # host threads as producers
    bash launch/gpu.sh -n 2 python -m benchmarks.triggers --gpu  # kernels as producers

Every rank is a node of its own and all ranks run at the same time. Rates are of empty triggers:
the ring and the proxy, without a transport. Times are of the slowest rank, the median of the
repeats. The last table computes what proxy threads could feed from the processor time of a trigger:
bytes of a chunk divided by it, for 2 threads that never wait.
"""

import argparse
import threading
import time
from typing import Any

import numpy as np
from mpi4py import MPI

from epcomm.bootstrap import make_bootstrap
from epcomm.cpu.segments import Segment
from epcomm.fabric.abi import constants, dtypes
from epcomm.fabric.fabric import Fabric, FabricOptions, RegionMemory
from epcomm.native import library
from epcomm.topology import make_topology

_TIMEOUT_NS = int(60e9)
_REGION_BYTES = 1 << 20
_CHUNKS = (4096, 16384, 65536, 262144, 1 << 20)
_CORES = 2
#: One NIC of 400 Gbit/s.
_NIC_GB_S = 50


class HostProducers:
    """Triggers put by threads of this process."""

    name = "host"

    def __init__(self, bootstrap: Any, rings: int, channels: int) -> None:
        self.segment = Segment.create("epcomm-triggers", _REGION_BYTES)
        region = RegionMemory(self.segment.address, _REGION_BYTES, self.segment, self.segment.fd)
        self.topology = make_topology(bootstrap.rank, bootstrap.hosts(), 1)
        how = FabricOptions("local", num_channels=channels, num_rings=rings, num_threads=rings)
        self.fabric = Fabric(bootstrap, self.topology, how, {constants["SIGNALS"]: region})

    def triggers(self, producers: int, count: int, round_trip: bool) -> float:
        """Nanoseconds until ``producers`` threads have put ``count`` triggers each."""
        results = [0] * producers

        def run(index: int) -> None:
            channel = index % self.fabric.options.num_channels
            # A pointer taken once: the threads leave Python for all of the loop.
            results[index] = library.epcomm_fabric_measure_triggers(
                self.fabric.pointer, 0, channel, count, round_trip, _TIMEOUT_NS
            )

        threads = [threading.Thread(target=run, args=(i,)) for i in range(producers)]
        started = time.perf_counter_ns()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        elapsed = time.perf_counter_ns() - started
        if min(results) < 0:
            self.fabric.check()
            raise RuntimeError("triggers did not complete in time")
        return elapsed

    def ping(self, peer: int, rounds: int, base: int) -> float:
        """Nanoseconds of ``rounds`` signals back and forth."""
        ns = library.epcomm_fabric_measure_ping(
            self.fabric.pointer, peer, self.topology.node,
            self.segment.address + 8 * peer, base, rounds, self.topology.node < peer, _TIMEOUT_NS,
        )  # fmt: skip
        if ns < 0:
            self.fabric.check()
            raise RuntimeError("signals did not arrive in time")
        return ns

    def close(self) -> None:
        self.fabric.close()


class KernelProducers:
    """Triggers put by threads of a kernel on this rank's GPU."""

    name = "kernel"

    def __init__(self, bootstrap: Any, rings: int, channels: int) -> None:
        import cupy

        from epcomm.cuda.memory import DeviceBlock
        from epcomm.cuda.rings import DeviceRings

        self.runtime = cupy.cuda.runtime
        self.result = cupy.zeros(3, cupy.uint64)
        self.block = DeviceBlock(_REGION_BYTES)
        self.runtime.memset(self.block.pointer, 0, self.block.num_bytes)
        self.runtime.deviceSynchronize()
        device = self.runtime.getDevice()
        region = RegionMemory(self.block.pointer, _REGION_BYTES, self.block, device=device)
        self.topology = make_topology(bootstrap.rank, bootstrap.hosts(), 1)
        how = FabricOptions(
            "local-cuda",
            num_channels=channels,
            num_rings=rings,
            num_threads=rings,
            device_fills=True,
            longest_nap=2e-4,
        )
        self.rings = DeviceRings(how)
        self.fabric = Fabric(
            bootstrap, self.topology, how, {constants["SIGNALS"]: region}, self.rings.memory
        )

    def _probe(self, **fields: int) -> np.ndarray:
        probe = np.zeros((), dtypes["probe"])
        probe["fabric"] = np.frombuffer(self.fabric.struct, np.uint8)
        probe["signals"], probe["result"] = self.block.pointer, self.result.data.ptr
        probe["num_channels"] = self.fabric.options.num_channels
        probe["timeout_ns"] = _TIMEOUT_NS
        for name, value in fields.items():
            probe[name] = value
        return probe

    def _run(self, launch: Any, probe: np.ndarray) -> float:
        self.result[:] = 0
        self.runtime.deviceSynchronize()
        if launch(probe.ctypes.data, None) != 0:
            raise RuntimeError("the kernel could not be launched")
        self.runtime.deviceSynchronize()
        _, failures, ns = self.result.get().tolist()
        if failures:
            self.fabric.check()
            raise RuntimeError("triggers did not complete in time")
        return float(ns)

    def triggers(self, producers: int, count: int, round_trip: bool) -> float:
        """Nanoseconds until ``producers`` blocks of one thread have put ``count`` each."""
        probe = self._probe(
            triggers=count, round_trip=round_trip, num_blocks=producers, num_threads=1
        )
        return self._run(library.epcomm_fabric_probe_triggers, probe)

    def ping(self, peer: int, rounds: int, base: int) -> float:
        """Nanoseconds of ``rounds`` signals back and forth."""
        me = self.topology.node
        probe = self._probe(
            triggers=rounds, epoch=base, peer=peer, first_signal=me, their_signal=peer,
            leads=me < peer,
        )  # fmt: skip
        return self._run(library.epcomm_fabric_probe_ping, probe)

    def close(self) -> None:
        self.fabric.close()
        self.rings.close()
        self.block.close()


def slowest(comm: Any, repeats: int, measure: Any) -> float:
    """Median over repeats of the slowest rank's value."""
    values = []
    for _ in range(repeats):
        comm.Barrier()
        values.append(comm.allreduce(measure(), op=MPI.MAX))
    return float(np.median(values))


def processor_ns(fabric: Fabric) -> tuple[int, int]:
    """Processor time of the proxy threads and triggers they took, so far."""
    time.sleep(0.1)  # it is brought up to date when a thread naps
    threads = fabric.threads
    return int(threads["busy_ns"].sum()), int(threads["triggers"].sum())


def measure_rings(comm: Any, kind: Any, given: argparse.Namespace, rings: int) -> list[str]:
    """One line per number of producers."""
    lines = []
    producers_of = kind(make_bootstrap(comm), rings, max(rings, given.producers[-1]))
    for producers in given.producers:
        busy, taken = processor_ns(producers_of.fabric)
        rate_ns = slowest(
            comm, given.repeats, lambda p=producers: producers_of.triggers(p, given.count, False)
        )
        busy_after, taken_after = processor_ns(producers_of.fabric)
        cost = (busy_after - busy) / max(1, taken_after - taken)
        trip_ns = slowest(
            comm,
            given.repeats,
            lambda p=producers: producers_of.triggers(p, max(1, given.count // 10), True),
        )
        given.costs.append(cost)
        lines.append(
            f"{kind.name:7s}{comm.size:6d}{rings:6d}{producers:10d}"
            f"{producers * given.count / rate_ns * 1e3:17.3f}"
            f"{trip_ns / max(1, given.count // 10) / 1e3:15.2f}{cost:20.0f}"
        )
    comm.Barrier()
    producers_of.close()
    return lines


def measure_latency(comm: Any, kind: Any, given: argparse.Namespace) -> str:
    """From a trigger to the counter at the peer: half of a signal's round trip."""
    producers_of = kind(make_bootstrap(comm), 1, 1)
    peer, rounds, base = comm.rank ^ 1, max(1, given.count // 10), 0
    values = []
    for _ in range(given.repeats):
        comm.Barrier()
        ns = producers_of.ping(peer, rounds, base) if peer < comm.size else 0.0
        base += rounds
        values.append(comm.allreduce(ns, op=MPI.MAX) / rounds / 2e3)
    comm.Barrier()
    producers_of.close()
    return f"{kind.name} producers, {comm.size // 2} pairs: {np.median(values):.2f} us"


def print_feed(cost_ns: float) -> None:
    """What proxies could feed at this cost."""
    print(f"\n{_CORES} proxy threads at {cost_ns:.0f} ns a trigger, without the transport's post:")
    for chunk in _CHUNKS:
        print(f"  chunks of {chunk:8d} bytes: {_CORES * chunk / cost_ns:10.1f} GB/s")
    least = _NIC_GB_S * cost_ns / _CORES
    print(f"  {_NIC_GB_S} GB/s need chunks of at least {least:.0f} bytes")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="kernels as producers")
    parser.add_argument("--rings", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--producers", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--count", type=int, default=5000, help="triggers of a producer")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    given.costs = []
    comm = MPI.COMM_WORLD
    kind = KernelProducers if given.gpu else HostProducers
    first = comm.rank == 0
    if first:
        print("producer ranks rings producers  M triggers/s  round trip us  proxy ns per trigger")
    for rings in given.rings:
        for line in measure_rings(comm, kind, given, rings):
            if first:
                print(line, flush=True)
    if comm.size > 1:
        latency = measure_latency(comm, kind, given)
        if first:
            print(f"\ntrigger to the peer's counter, {latency}")
    cost = comm.allreduce(max(given.costs), op=MPI.MAX)
    if first:
        print_feed(cost)


if __name__ == "__main__":
    main()
