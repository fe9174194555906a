"""Buffer.explain_memory: bytes by purpose, and the errors of a Buffer's arguments."""

import pytest

from epcomm import Buffer
from epcomm.backend import Config, Options
from epcomm.cpu.node import message_sizes
from epcomm.cpu.scaleout_fabric import FabricScaleOut, fabric_options
from epcomm.fabric.fabric import RingMemory
from epcomm.fabric.twins import run_twins
from epcomm.topology import Topology, make_topology

SIZES = {
    "num_ranks": 16,
    "ranks_per_node": 8,
    "hidden": 7168,
    "num_experts": 256,
    "num_topk": 8,
    "max_tokens": 128,
}


def test_rows_dominate_and_are_what_they_must_be():
    report = Buffer.explain_memory(**SIZES)
    rows = 16 * 128
    received = report.purposes["received rows"][0]
    least = rows * (2 * 7168 + 8 * 8 + 4 * 8 + 8)
    assert least <= received <= least + 5 * 128
    assert report.total == sum(nbytes for nbytes, _ in report.purposes.values())
    assert all(nbytes >= 0 for nbytes, _ in report.purposes.values())


def test_staging_is_two_ways_for_every_other_node():
    report = Buffer.explain_memory(**SIZES)
    nbytes, why = report.purposes["scale-out staging"]
    assert nbytes >= 2 * 1 * 128 * 2 * 7168
    assert "1 other nodes x 128 records" in why
    one_node = Buffer.explain_memory(**{**SIZES, "ranks_per_node": 16})
    assert one_node.purposes["scale-out staging"][0] == 0


@pytest.mark.parametrize("fabric", ["proxy/local", "proxy/emulated"])
def test_memory_of_a_fabric_is_what_a_rank_allocates(fabric):
    # Two ends of one process stand for the ranks of a rail.
    sizes = {**SIZES, "num_ranks": 2, "ranks_per_node": 1, "hidden": 64, "max_tokens": 50}
    purposes = Buffer.explain_memory(**sizes, fabric=fabric).purposes
    config, options = Config(64, 256, 8, 50), Options(60.0, 1, False, fabric=fabric)
    held: list[dict[int, int]] = []

    def make_end(twin):
        topology = Topology(twin.rank, (0, 1))
        end = FabricScaleOut(twin, topology, message_sizes(topology, config), options)
        held.append({region: segment.nbytes for region, segment in end._segments.items()})
        twin.barrier()
        end.close()

    run_twins(60.0, make_end)
    for segments in held:
        assert purposes["scale-out staging"][0] == segments[1] + segments[2]
        assert purposes["scale-out signals"][0] == segments[0]
    rings = fabric_options(make_topology(0, [0] * 2, 1), options)
    assert purposes["fabric rings"][0] == sum(RingMemory.sizes(rings))
    # 2 x N x max_tokens records of the largest format.
    assert f"2 nodes x (50 records of up to {64 * 4 + 16 + 3 * 32}" in str(purposes)
    queues = purposes.get("fabric queues", (0, ""))[0]
    # A ring of 256 requests and 256 completions for each of three kinds of message.
    assert (queues > 3 * 256 * 128) == (fabric == "proxy/emulated")


def test_fp8_and_layout_change_the_rows():
    bf16 = Buffer.explain_memory(**SIZES).purposes["received rows"][0]
    fp8 = Buffer.explain_memory(**SIZES, quantize="fp8").purposes["received rows"][0]
    by_expert = Buffer.explain_memory(**SIZES, layout="expert").purposes["received rows"][0]
    assert 0.5 < fp8 / bf16 < 0.53
    assert 7.9 < by_expert / bf16 < 8


def test_report_reads_as_a_table():
    report = Buffer.explain_memory(**SIZES)
    lines = str(report).splitlines()
    assert len(lines) == len(report.purposes) + 1
    assert lines[-1].startswith("total")
    for name, (_, why) in report.purposes.items():
        assert any(line.startswith(name) and line.endswith(why) for line in lines)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"hidden": 20}, ValueError, "hidden: 20"),
        ({"hidden": "7168"}, TypeError, "hidden: expected an int"),
        ({"num_ranks": 0}, ValueError, "num_ranks"),
        ({"num_ranks": 1.5}, TypeError, "num_ranks"),
        ({"ranks_per_node": 0}, ValueError, "ranks_per_node"),
        ({"ranks_per_node": 5}, ValueError, "ranks_per_node: 5 does not divide"),
        ({"num_experts": 100}, ValueError, "num_experts: 100"),
        ({"layout": "token"}, ValueError, "layout: expected one of"),
        ({"quantize": "int8"}, ValueError, "quantize: expected"),
        ({"max_tokens": 2**20, "num_ranks": 4096, "num_experts": 4096}, ValueError, "32 bits"),
        ({"quantize": "fp8", "hidden": 24}, ValueError, "24 bytes in FP8"),
        ({"fabric": "pigeon"}, ValueError, "fabric: expected one of"),
        ({"fabric": "emulated"}, ValueError, "fabric: expected one of"),
        ({"backend": "tpu"}, ValueError, "backend: expected"),
        ({"max_staging_bytes": 1 << 30}, ValueError, "max_staging_bytes: only backend 'cuda'"),
        ({"max_staging_bytes": 0}, ValueError, "max_staging_bytes: 0"),
        ({"max_staging_bytes": 1e9, "backend": "cuda"}, TypeError, "max_staging_bytes: expected"),
    ],
)
def test_errors_are_those_of_the_buffer(change, kind, words):
    with pytest.raises(kind, match=words):
        Buffer.explain_memory(**{**SIZES, **change})
