"""What calls of a CUDA buffer wait for, and what lives meanwhile, with stand-ins for the GPU."""

import pytest
import torch

import epcomm
from epcomm.cuda import abi

if not abi.available:
    pytest.skip("libepcomm was built without CUDA", allow_module_level=True)

from cuda_stand_ins import HIDDEN, choices, inputs

# Waiting -----------------------------------------------------------------------------------


def test_cached_calls_wait_only_where_a_rank_may_have_no_window_left(buffer, gpu):
    handle = buffer.dispatch(inputs(), choices()).handle
    gpu.free_windows, gpu.behind = 2, 100
    buffer.dispatch(inputs(), choices())  # tells that every rank has two more
    first = gpu.launches[-1].number
    gpu.waited_for.clear()
    for _ in range(2):
        buffer.dispatch(inputs(), handle=handle)
    assert not gpu.waited_for
    for _ in range(3):
        buffer.dispatch(inputs(), handle=handle)
    # Not for their own verdicts: the GPU has two more calls to do meanwhile.
    assert gpu.waited_for == [first + 1, first + 2, first + 3]
    assert gpu.launches[-1].number == first + 5


def test_a_cached_call_waits_for_earlier_ones_until_their_windows_suffice(buffer, gpu):
    handle = buffer.dispatch(inputs(), choices()).handle
    gpu.free_windows, gpu.behind = 2, 100
    buffer.dispatch(inputs(), choices())
    for _ in range(2):
        buffer.dispatch(inputs(), handle=handle)
        buffer.combine(torch.zeros(5, HIDDEN, dtype=torch.bfloat16), handle)
    gpu.free_windows = 0
    gpu.waited_for.clear()
    buffer.dispatch(inputs(), handle=handle)
    # At last for its own: no report told of a window left. Combines report nothing.
    own = gpu.launches[-1].number
    assert gpu.waited_for == [own - 4, own - 2, own]
    assert buffer._backend._engine.report.prepared == own


@pytest.mark.parametrize("behind", [0, 100])
def test_a_cached_call_that_a_rank_has_no_window_for_is_made_again(buffer, gpu, behind):
    # Also where its own report, of no window left to anybody, comes before the host looks.
    gpu.free_windows = 0
    handle = buffer.dispatch(inputs(), choices()).handle
    launches, windows = len(gpu.launches), len(buffer._backend._engine.windows)
    gpu.behind, gpu.verdicts = behind, ["GROW"]
    buffer.dispatch(inputs(), handle=handle)
    assert len(gpu.launches) == launches + 2
    assert len(buffer._backend._engine.windows) == windows + 1


def test_a_cached_call_without_a_window_waits_for_its_own_verdict(buffer, gpu):
    handle = buffer.dispatch(inputs(), choices()).handle
    gpu.behind = 100
    held = [buffer.dispatch(inputs(), handle=handle) for _ in range(4)]
    gpu.free_windows = 9
    gpu.waited_for.clear()
    held.append(buffer.dispatch(inputs(), handle=handle))
    asked, moved = gpu.launches[-2:]
    assert asked.announcement.window_bytes == 0
    assert gpu.waited_for == [asked.number]
    assert moved.announcement.window_bytes


@pytest.mark.parametrize("verdict", ["MISMATCH", "STALE"])
def test_a_refusal_of_a_call_waited_for_is_raised_by_it(buffer, gpu, verdict):
    handle = buffer.dispatch(inputs(), choices()).handle
    gpu.free_windows = 0
    buffer.dispatch(inputs(), choices())
    gpu.behind = 100
    buffer.dispatch(inputs(), handle=handle)
    gpu.verdicts = [verdict]
    with pytest.raises(epcomm.EpcommError):
        buffer.dispatch(inputs(), handle=handle)


@pytest.mark.parametrize(("behind", "waits"), [(0, 0), (2, 0), (3, 6)])
def test_cached_calls_do_not_wait_where_the_gpu_keeps_up(buffer, gpu, behind, waits):
    handle = buffer.dispatch(inputs(), choices()).handle
    gpu.free_windows, gpu.behind = 2, behind
    buffer.dispatch(inputs(), choices())
    waited = gpu.waited
    for _ in range(8):
        buffer.dispatch(inputs(), handle=handle)
    assert gpu.waited - waited == waits


@pytest.mark.parametrize("fixed_rows", [None, 9])
def test_dispatches_leave_nothing_behind(buffer, gpu, fixed_rows):
    # Not only cached calls count windows, and not only their reports are read.
    credit = buffer._backend._core.credit
    for _ in range(50):
        buffer.dispatch(inputs(), choices(), fixed_rows=fixed_rows)
    assert len(credit._later) <= 1


def test_replays_of_a_graph_tell_of_no_windows(buffer, gpu):
    handle = buffer.dispatch(inputs(), choices()).handle
    gpu.free_windows = 3
    buffer.dispatch(inputs(), choices())
    report = buffer._backend._engine.report
    earlier = report.free_windows
    gpu.free_windows, gpu.behind = 0, 100
    held = [buffer.dispatch(inputs(), choices()) for _ in range(3)]
    buffer.dispatch(inputs(), handle=handle)
    report.free_windows = earlier
    buffer.dispatch(inputs(), handle=handle)
    assert gpu.waited_for[-1] == gpu.launches[-1].number
    del held


def test_fixed_rows_wait_for_nothing_once_there_are_windows(buffer, gpu):
    buffer.dispatch(inputs(), choices(), fixed_rows=9)
    waited = gpu.waited
    handle = buffer.dispatch(inputs(), choices(), fixed_rows=9).handle
    buffer.dispatch(inputs(), handle=handle)
    assert gpu.waited == waited


def test_routes_of_the_next_call_are_made_while_this_one_waits(buffer, gpu, monkeypatch):
    engine, made = buffer._backend._engine, []
    real = engine.make_routes

    def make_routes(form, like, *rest):
        made.append(len(gpu.launches))
        return real(form, like, *rest)

    monkeypatch.setattr(engine, "make_routes", make_routes)
    buffer.dispatch(inputs(), choices())
    launches = len(gpu.launches)
    assert made[0] == 0 < made[1] <= launches
    kept = []
    for options, tokens, ahead in [
        ({}, None, True),
        ({}, 3, False),  # of another number of tokens
        ({}, 3, True),
        ({"layout": "expert"}, 3, False),
        ({"layout": "expert"}, 3, True),
    ]:
        made.clear()
        launches = len(gpu.launches)
        topk_idx = choices()[:tokens]
        kept.append(buffer.dispatch(inputs()[:tokens], topk_idx, **options).handle._state.routes)
        assert made == ([launches + 1] if ahead else [launches, launches + 1])
        assert kept[-1].block.topk_idx == topk_idx.data_ptr()
        assert kept[-1].number == gpu.launches[-1].number
        assert gpu.launches[-1].block.routes.dests == kept[-1].block.dests
    gpu.stream = 7
    made.clear()
    buffer.dispatch(inputs()[:3], choices()[:3], layout="expert")
    assert made == [len(gpu.launches) - 1, len(gpu.launches)]  # an allocation belongs to a stream
    assert len({routes.block.dests for routes in kept}) == len(kept)


# Streams, events, graphs -------------------------------------------------------------------


def test_what_a_call_uses_lives_as_long_as_it_runs(buffer, gpu):
    x, topk_idx = inputs(), choices()
    got = buffer.dispatch(x, topk_idx)
    assert gpu.launches[-1].stream == 0
    assert not gpu.kept
    gpu.stream = 77
    buffer.combine(got.x, got.handle)
    assert gpu.launches[-1].stream == 77
    routes = got.handle._state.routes
    assert set(gpu.kept) == {(t.data_ptr(), 77) for t in (routes.memory, topk_idx)}
    gpu.kept.clear()
    got = buffer.dispatch(x, handle=got.handle, async_op=True)
    own = gpu.launches[-1].stream
    assert own not in (0, 77)
    assert (77, own) in gpu.ordered
    assert set(gpu.kept) == {(t.data_ptr(), own) for t in (routes.memory, topk_idx, x)}


def test_a_window_last_used_on_another_stream_is_waited_for(buffer, gpu):
    gpu.stream = 5
    buffer.dispatch(inputs(), choices())
    gpu.ordered.clear()
    buffer.dispatch(inputs(), choices())
    assert not gpu.ordered
    gpu.stream = 6
    buffer.dispatch(inputs(), choices())
    assert gpu.ordered == [(5, 6)]


def test_an_event_is_recorded_again_only_when_nobody_holds_it(buffer, gpu):
    kept = [buffer.dispatch(inputs(), choices()) for _ in range(3)]
    events = [launch.event for launch in gpu.launches]
    # One for each call, a repeated one included.
    assert len(set(events)) == 3
    assert set(events) == {result.event.address for result in kept}
    combined = buffer.combine(kept[0].x, kept[0].handle)
    assert combined.event.address not in events
    address = kept[1].event.address
    del kept[1]
    fresh = buffer.dispatch(inputs(), choices())
    assert fresh.event.address == gpu.launches[-1].event == address
    assert len(gpu.events) == 4


def test_captured_calls_have_windows_and_events_of_their_own(buffer, gpu):
    warm = buffer.dispatch(inputs(), choices(), fixed_rows=9)
    made = len(gpu.events)
    del warm
    gpu.capturing = True
    got = buffer.dispatch(inputs(), choices(), fixed_rows=9)
    captured = gpu.launches[-1]
    reserved, event = captured.announcement.window_serial, got.event.address
    assert event != captured.event
    assert len(gpu.events) == made + 1
    memory = got.handle._state.routes.memory
    del got
    assert event not in gpu.events
    gpu.capturing = False
    for _ in range(4):
        later = buffer.dispatch(inputs(), choices(), fixed_rows=9)
        assert gpu.launches[-1].announcement.window_serial != reserved
        assert later.handle._state.routes.memory is not memory
    gpu.capturing = True
    buffer.dispatch(inputs(), choices(), fixed_rows=9)
    assert gpu.launches[-1].announcement.window_serial == reserved


def test_what_has_to_wait_cannot_be_captured(buffer, gpu):
    got = buffer.dispatch(inputs(), choices())
    launches = len(gpu.launches)
    gpu.capturing = True
    with pytest.raises(RuntimeError, match="fixed_rows"):
        buffer.dispatch(inputs(), choices())
    with pytest.raises(RuntimeError, match="windows are too small"):
        buffer.combine(torch.zeros(5, HIDDEN).repeat(2000, 1)[:5], wide_handle(buffer, got))
    assert len(gpu.launches) == launches


def wide_handle(buffer, got):
    """A handle whose fullest rank's rows fit no window to combine from."""
    state = got.handle._state
    state.max_rows = 10**6
    return got.handle
