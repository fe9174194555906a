"""Trigger rings and proxy threads: rate, round trip, latency to a peer's counter, processor time.

    bash launch/mpirun.sh 2 -m benchmarks.triggers               # host threads as producers
    bash launch/gpu.sh -n 2 python -m benchmarks.triggers --gpu  # kernels as producers
    bash launch/bench.sh --nodes 2 --cases triggers              # the same, for 2, 4 and 8 ranks

Every rank is a node of its own and all ranks run at the same time. Rates are of empty triggers:
the ring and the proxy, without a transport. Times are of the slowest rank, the median of the
repeats. The last table computes what proxy threads could feed from the processor time of a trigger:
bytes of a chunk divided by it, for 2 threads that never wait.
"""

import argparse
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

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
#: Of a rank, for its proxy threads.
CORES = 2
#: One NIC of 400 Gbit/s.
NIC_GB_S = 50


@dataclass(frozen=True)
class Sweep:
    """What is measured.

    Attributes:
        rings: numbers of trigger rings.
        threads: numbers of proxy threads, where there are as many rings; None: one for each ring.
        producers: numbers of threads that put triggers, ascending.
        count: triggers of a producer.
        repeats: of each measurement.
    """

    rings: tuple[int, ...] = (1, 2, 4)
    threads: tuple[int, ...] | None = None
    producers: tuple[int, ...] = (1, 2, 8)
    count: int = 5000
    repeats: int = 5

    def pairs(self) -> list[tuple[int, int]]:
        """Rings and threads."""
        return [(r, t) for r in self.rings for t in self.threads or (r,) if t <= r]


@dataclass(frozen=True)
class TriggerFigure:
    """One line.

    Attributes:
        producer: "host" or "kernel".
        ranks: that work at the same time.
        rings: of a rank.
        threads: that serve them.
        producers: of a rank.
        rate: millions of triggers a second of a rank, the slowest one's.
        round_trip_us: until a trigger has completed.
        proxy_ns: processor time of a trigger, of this rank.
    """

    producer: str
    ranks: int
    rings: int
    threads: int
    producers: int
    rate: float
    round_trip_us: float
    proxy_ns: float

    HEADER: ClassVar[str] = (
        "producer ranks rings threads producers  M triggers/s  round trip us  proxy ns each"
    )

    def __str__(self) -> str:
        return (
            f"{self.producer:8s}{self.ranks:6d}{self.rings:6d}{self.threads:8d}"
            f"{self.producers:10d}{self.rate:14.3f}{self.round_trip_us:15.2f}{self.proxy_ns:15.0f}"
        )


class HostProducers:
    """Triggers put by threads of this process."""

    name = "host"

    def __init__(self, bootstrap: Any, rings: int, threads: int, channels: int) -> None:
        self.segment = Segment.create("epcomm-triggers", _REGION_BYTES)
        region = RegionMemory(self.segment.address, _REGION_BYTES, self.segment, self.segment.fd)
        self.topology = make_topology(bootstrap.rank, bootstrap.hosts(), 1)
        how = FabricOptions("local", num_channels=channels, num_rings=rings, num_threads=threads)
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

    def __init__(self, bootstrap: Any, rings: int, threads: int, channels: int) -> None:
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
            num_threads=threads,
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
    # It is brought up to date when a thread naps, soon after it has nothing to do. No longer: where
    # kernels fill the rings naps are short, and looking at empty rings would count as work.
    time.sleep(2e-3)
    threads = fabric.threads
    return int(threads["busy_ns"].sum()), int(threads["triggers"].sum())


def measure_rings(comm: Any, kind: Any, sweep: Sweep) -> Iterator[TriggerFigure]:
    """A figure for each number of rings, threads and producers. Collective."""
    for rings, threads in sweep.pairs():
        channels = max(rings, sweep.producers[-1])
        producers_of = kind(make_bootstrap(comm), rings, threads, channels)
        for producers in sweep.producers:
            where = (kind.name, comm.size, rings, threads, producers)
            yield TriggerFigure(*where, *_measure(comm, producers_of, producers, sweep))
        comm.Barrier()
        producers_of.close()


def _measure(
    comm: Any, producers_of: Any, producers: int, sweep: Sweep
) -> tuple[float, float, float]:
    busy, taken = processor_ns(producers_of.fabric)
    rate_ns = slowest(
        comm, sweep.repeats, lambda: producers_of.triggers(producers, sweep.count, False)
    )
    busy_after, taken_after = processor_ns(producers_of.fabric)
    cost = (busy_after - busy) / max(1, taken_after - taken)
    trips = max(1, sweep.count // 10)
    trip_ns = slowest(comm, sweep.repeats, lambda: producers_of.triggers(producers, trips, True))
    return producers * sweep.count / rate_ns * 1e3, trip_ns / trips / 1e3, cost


def measure_latency(comm: Any, kind: Any, sweep: Sweep) -> float:
    """Microseconds from a trigger to the counter at the peer: half of a signal's round trip."""
    producers_of = kind(make_bootstrap(comm), 1, 1, 1)
    peer, rounds, base = comm.rank ^ 1, max(1, sweep.count // 10), 0
    values = []
    for _ in range(sweep.repeats):
        comm.Barrier()
        ns = producers_of.ping(peer, rounds, base) if peer < comm.size else 0.0
        base += rounds
        values.append(comm.allreduce(ns, op=MPI.MAX) / rounds / 2e3)
    comm.Barrier()
    producers_of.close()
    return float(np.median(values))


def feed(chunk_bytes: float, cost_ns: float, cores: int = CORES) -> float:
    """GB/s that proxy threads keep going which spend ``cost_ns`` on a chunk and never wait."""
    return cores * chunk_bytes / cost_ns


def print_feed(cost_ns: float) -> None:
    """What proxies could feed at this cost."""
    print(f"\n{CORES} proxy threads at {cost_ns:.0f} ns a trigger, without the transport's post:")
    for chunk in _CHUNKS:
        print(f"  chunks of {chunk:8d} bytes: {feed(chunk, cost_ns):10.1f} GB/s")
    print(f"  {NIC_GB_S} GB/s need chunks of at least {NIC_GB_S * cost_ns / CORES:.0f} bytes")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--gpu", action="store_true", help="kernels as producers")
    add("--rings", type=int, nargs="+", default=[1, 2, 4])
    add("--threads", type=int, nargs="+", help="that serve the rings; as many by default")
    add("--producers", type=int, nargs="+", default=[1, 2, 8])
    add("--count", type=int, default=5000, help="triggers of a producer")
    add("--repeats", type=int, default=5)
    given = parser.parse_args()
    threads = None if given.threads is None else tuple(given.threads)
    producers = tuple(sorted(given.producers))
    sweep = Sweep(tuple(given.rings), threads, producers, given.count, given.repeats)
    comm = MPI.COMM_WORLD
    kind = KernelProducers if given.gpu else HostProducers
    first = comm.rank == 0
    if first:
        print(TriggerFigure.HEADER)
    cost = 0.0
    for figure in measure_rings(comm, kind, sweep):
        cost = max(cost, figure.proxy_ns)
        if first:
            print(figure, flush=True)
    if comm.size > 1:
        latency = measure_latency(comm, kind, sweep)
        if first:
            print(f"\ntrigger to the peer's counter, {comm.size // 2} pairs: {latency:.2f} us")
    cost = comm.allreduce(cost, op=MPI.MAX)
    if first:
        print_feed(cost)


if __name__ == "__main__":
    main()
