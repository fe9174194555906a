"""How many SMs a rank gets from measured rates; who measures, and who is told. Needs no GPU."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from epcomm.cuda import rates as rates_module
from epcomm.cuda.rates import Place, Rates, agree_on_rates, block_counts
from epcomm.cuda.sms import (
    Demand,
    Neighbourhood,
    check_sms,
    enough_sms,
    free_share,
    limiting_rate,
    share_of_sms,
)
from epcomm.errors import PeerError

# Of the kind an H200 has: some 65 GB/s an SM while few are busy, 4.2 TB/s at most.
BLOCKS = (4, 8, 16, 33, 50, 66, 82, 99, 116, 132)
CURVE = tuple(1e12 * r for r in (0.27, 0.53, 1.05, 2.1, 3.0, 3.5, 3.8, 4.0, 4.15, 4.2))
RATES = Rates(BLOCKS, CURVE)


def test_rates_between_measured_points_lie_on_straight_lines():
    assert RATES.at(0) == 0.0
    assert RATES.at(2) == pytest.approx(CURVE[0] / 2)
    assert RATES.at(41) == pytest.approx(CURVE[3] + (CURVE[4] - CURVE[3]) * 8 / 17)
    assert RATES.at(66) == CURVE[5]
    assert RATES.at(1000) == RATES.memory == 4.2e12


@pytest.mark.parametrize("on_gpu", [1, 2, 3, 4, 6, 8, 40, 132])
def test_ranks_of_a_gpu_fit_on_it_together(on_gpu):
    share = share_of_sms(132, on_gpu)
    sms = enough_sms(RATES, Neighbourhood(on_gpu, on_gpu, 8), share)
    assert 1 <= sms <= share
    assert sms * on_gpu <= 132
    assert share <= 132 // 4  # room for the model's kernels and other buffers


@pytest.mark.parametrize("on_gpu", [4, 8])
def test_nine_tenths_of_memory_rate_and_not_one_sm_more(on_gpu):
    sms = enough_sms(RATES, Neighbourhood(on_gpu, on_gpu, 8), share_of_sms(132, on_gpu))
    assert RATES.at(sms * on_gpu) >= 0.9 * 4.2e12
    assert RATES.at((sms - 1) * on_gpu) < 0.9 * 4.2e12


def test_share_is_used_up_where_memory_rate_is_out_of_reach():
    slow = Rates((10, 100), (1e11, 1e12))
    assert enough_sms(slow, Neighbourhood(5, 5, 8), 12) == 12


def test_link_limits_a_rank_of_its_own_gpu():
    linked = Rates(BLOCKS, CURVE, link=4.0e11)
    where = Neighbourhood(1, 8, 8)
    copies = 8 * (1 - (7 / 8) ** 8)
    # In the time of the copies that leave, everything else must be moved as well.
    assert limiting_rate(linked, where) == pytest.approx(4e11 * (1 + copies) / (copies * 7 / 8))
    sms = enough_sms(linked, where, share_of_sms(132, 1))
    assert RATES.at(sms) >= 0.9 * limiting_rate(linked, where) > RATES.at(sms - 1)
    assert sms < enough_sms(RATES, Neighbourhood(1, 1, 8), share_of_sms(132, 1))


def test_fast_link_leaves_memory_as_the_limit():
    linked = Rates(BLOCKS, CURVE, link=1e14)
    assert limiting_rate(linked, Neighbourhood(1, 8, 8)) == linked.memory


def test_ranks_of_one_gpu_send_nothing_over_a_link():
    assert limiting_rate(Rates(BLOCKS, CURVE, link=1.0), Neighbourhood(4, 4, 8)) == 4.2e12


def test_block_counts_end_with_all_sms():
    for sms in (1, 2, 7, 46, 108, 132, 148):
        counts = block_counts(sms)
        assert counts[-1] == sms
        assert list(counts) == sorted(set(counts))
        assert counts[0] >= 1


class _World:
    """Ranks as threads, with the exchange a bootstrap offers."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.items: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=10)

    def bootstrap(self, rank: int) -> Any:
        world = self

        class _Rank:
            size = world.size

            def __init__(self) -> None:
                self.rank = rank

            def allgather(self, item: Any) -> list[Any]:
                world.items[rank] = item
                world.barrier.wait()
                items = list(world.items)
                world.barrier.wait()
                return items

        return _Rank()


class _Probe:
    """Notes what it is asked; rates are its own."""

    def __init__(self, number: int, fails: str = "") -> None:
        self.number = number
        self.fails = fails
        self.asked: list[str] = []

    def _ask(self, what: str) -> None:
        self.asked.append(what)
        if what == self.fails:
            raise RuntimeError(f"no {what} here")

    def memory(self, block_counts: tuple[int, ...]) -> tuple[float, ...]:
        self._ask("memory")
        return tuple(float(b * (self.number + 1)) for b in block_counts)

    def offer(self) -> bytes:
        self._ask("offer")
        return bytes([self.number])

    def map(self, offered: bytes) -> None:
        self._ask("map")
        self.mapped = offered[0]

    def link(self) -> float:
        self._ask("link")
        return 100.0 - self.number

    def unmap(self) -> None:
        self._ask("unmap")

    def withdraw(self) -> None:
        self._ask("withdraw")


def _agree(places: list[Place], probes: list[_Probe], known: list[dict] | None = None) -> list[Any]:
    """What every rank gets or raises. Each has its own memory of earlier rates."""
    world = _World(len(places))
    local = threading.local()

    class _Known:
        def get(self, key: Any) -> Any:
            return local.known.get(key)

        def __setitem__(self, key: Any, value: Any) -> None:
            local.known[key] = value

        def __getitem__(self, key: Any) -> Any:
            return local.known[key]

    def run(rank: int) -> Any:
        local.known = {} if known is None else known[rank]
        try:
            return agree_on_rates(world.bootstrap(rank), places[rank], probes[rank])
        except Exception as error:
            return error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rates_module, "_known", _Known())
        with ThreadPoolExecutor(len(places)) as pool:
            return list(pool.map(run, range(len(places))))


def test_first_rank_of_a_shared_gpu_measures_alone_and_tells():
    places = [Place("a", "host", 132)] * 4
    probes = [_Probe(rank) for rank in range(4)]
    got = _agree(places, probes)
    assert [probe.asked for probe in probes] == [["memory"], [], [], []]
    assert got == [got[0]] * 4
    assert got[0].link is None
    assert got[0].memory == 132.0


def test_gpus_of_a_host_measure_links_around_a_ring():
    places = [Place(gpu, "host", 132) for gpu in "abcabc"]
    probes = [_Probe(rank) for rank in range(6)]
    got = _agree(places, probes)
    asked = ["memory", "offer", "map", "link", "unmap", "withdraw"]
    assert [probe.asked for probe in probes] == [asked] * 3 + [[]] * 3
    assert [probe.mapped for probe in probes[:3]] == [1, 2, 0]
    assert {rates.link for rates in got} == {98.0}  # the slowest
    assert [rates.memory for rates in got] == [132.0, 264.0, 396.0] * 2


def test_hosts_with_one_gpu_take_part_in_the_exchanges_of_others():
    places = [Place("a", "one", 8), Place("b", "two", 8), Place("c", "two", 8)]
    got = _agree(places, [_Probe(rank) for rank in range(3)])
    assert [rates.link for rates in got] == [None, 98.0, 98.0]


def test_known_rates_are_not_measured_again_and_newcomers_are_told():
    places = [Place("a", "host", 132)] * 3
    known: list[dict] = [{}, {}, {}]
    first = _agree(places[:2], [_Probe(0), _Probe(1)], known)
    probes = [_Probe(rank) for rank in range(5, 8)]
    # The newcomer comes first, where it would have to measure.
    got = _agree(places, probes, [known[2], known[0], known[1]])
    assert got == [first[0]] * 3
    assert all(not probe.asked for probe in probes)
    assert known[2] == known[0]


def test_what_is_known_of_one_gpu_is_not_taken_for_another():
    places = [Place(gpu, "host", 132) for gpu in "ab"]
    known: list[dict] = [{}, {}]
    first = _agree(places, [_Probe(0), _Probe(1)], known)
    again = _agree(places, [_Probe(5), _Probe(6)], known)
    assert again == first
    assert first[0] != first[1]


@pytest.mark.parametrize("step", ["memory", "offer", "map", "link"])
def test_failure_of_one_rank_reaches_all(step):
    places = [Place(gpu, "host", 132) for gpu in "abab"]
    probes = [_Probe(rank, fails=step if rank == 1 else "") for rank in range(4)]
    got = _agree(places, probes)
    assert type(got[1]) is RuntimeError
    for rank in (0, 2, 3):
        assert isinstance(got[rank], PeerError)
        assert f"rank 1: no {step} here" in str(got[rank])


@pytest.mark.parametrize(
    ("wanted", "held", "share"),
    [
        ([None], 0, 33),
        ([None] * 8, 0, 16),
        ([60, None], 0, 33),
        ([None] * 4, 24, 8),
        ([None] * 4, 32, 1),  # two are left, which others should have
        ([None] * 8, 16, 1),
    ],
)
def test_open_buffers_leave_less(wanted, held, share):
    assert free_share(132, [Demand(one, held) for one in wanted]) == share


@pytest.mark.parametrize(
    ("wanted", "held", "share"),
    [([16] * 8, 0, 1), ([None] * 8, 0, 16), ([2] * 8, 14, 1), ([130, None], 0, 2), ([132], 0, 9)],
)
def test_blocks_that_can_all_be_resident(wanted, held, share):
    check_sms(132, share, [Demand(one, held) for one in wanted])


@pytest.mark.parametrize(
    ("wanted", "held", "share", "words"),
    [
        ([17] * 8, 0, 1, "the 8 ranks on this GPU need 136 SMs together, and it has 132"),
        (
            [None] * 8,
            16,
            1,
            "need 136 SMs together, and it has 132; open buffers and network cards hold 128",
        ),
        (
            [4] * 8,
            13,
            1,
            "need 136 SMs together, .* open buffers and network cards hold 104",
        ),
        ([130, None], 0, 3, "need 133 SMs .* smaller num_sms to every Buffer"),
        ([133], 0, 1, "the 1 ranks on this GPU need 133 SMs"),
    ],
)
def test_blocks_that_cannot_all_be_resident_are_refused(wanted, held, share, words):
    with pytest.raises(ValueError, match=words):
        check_sms(132, share, [Demand(one, held) for one in wanted])
