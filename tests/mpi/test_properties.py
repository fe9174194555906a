"""Drawn cases: every rank draws the same ones, and each must equal the oracle byte for byte."""

import torch
from harness import Case, check, make_buffer, nodes_of
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

HIDDENS = [16, 48, 80, 128, 144, 200, 256, 264, 656, 1040]
SETTINGS = settings(
    deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@st.composite
def cases(draw: st.DrawFn, size: int) -> Case:
    hidden = draw(st.sampled_from(HIDDENS))
    experts_per_rank = draw(st.integers(1, 5))
    layout = draw(st.sampled_from(["rank", "expert"]))
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float32]))
    packs = hidden % 16 == 0
    sent = draw(st.sampled_from(["rows", "quantize", "packed"])) if packs else "rows"
    scales = draw(st.sampled_from(["f32", "ue8m0"]))
    wires = [None, "f32", "bf16", "logfmt8", "logfmt10"]
    return Case(
        ranks_per_node=draw(st.sampled_from(nodes_of(size))),
        hidden=hidden,
        experts_per_rank=experts_per_rank,
        num_topk=draw(st.integers(1, min(experts_per_rank * size, 12))),
        tokens=tuple(draw(st.lists(st.integers(0, 20), min_size=1, max_size=size))),
        routing=draw(st.sampled_from(["uniform", "skewed", "one rank", "sparse"])),
        dtype=dtype,
        quantize={"f32": "fp8", "ue8m0": "fp8_ue8m0"}[scales] if sent == "quantize" else None,
        packed=scales if sent == "packed" else None,
        layout=layout,
        alignment=draw(st.sampled_from([1, 2, 3, 16])) if layout == "expert" else 1,
        with_weights=draw(st.booleans()),
        row_weights=draw(st.booleans()),
        num_bias=draw(st.integers(0, 2)),
        wire=draw(st.sampled_from(wires)),
        seed=draw(st.integers(0, 2**16)),
    )


def test_any_case_equals_the_oracle(comm):
    # The oracle's time grows with the world; so that of a run does not.
    @settings(SETTINGS, max_examples=40 if comm.size <= 4 else 20)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        case = data.draw(cases(comm.size))
        note(str(case))
        with make_buffer(comm, case) as buffer:
            check(comm, case, buffer)
            check(comm, case, buffer)

    run()
