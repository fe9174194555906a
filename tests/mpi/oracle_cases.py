"""The cases that every back end is tested with, and some with rows of real size."""

import torch
from harness import Case

CASES = {
    "bf16": Case(1),
    "f32": Case(1, dtype=torch.float32),
    "fp8": Case(1, hidden=208, quantize="fp8"),
    "fp8 power of two": Case(1, hidden=656, quantize="fp8_ue8m0"),
    "fp8 from f32": Case(1, hidden=144, quantize="fp8", dtype=torch.float32),
    "packed pair": Case(1, hidden=272, packed="f32"),
    "packed pair power of two": Case(1, hidden=528, packed="ue8m0"),
    "expert layout": Case(1, layout="expert"),
    "expert layout aligned": Case(1, layout="expert", alignment=8, quantize="fp8", hidden=128),
    "odd expert count": Case(1, experts_per_rank=3, layout="expert", alignment=5),
    "one expert a rank": Case(1, experts_per_rank=1, num_topk=1),
    "top-1": Case(1, num_topk=1),
    "top-k is all experts of one rank": Case(1, experts_per_rank=6, num_topk=6),
    "no weights": Case(1, with_weights=False),
    "row weights": Case(1, row_weights=True),
    "row weights by expert": Case(1, row_weights=True, layout="expert", dtype=torch.float32),
    "one bias": Case(1, num_bias=1),
    "two biases": Case(1, num_bias=2, dtype=torch.float32),
    "zeros of both signs": Case(1, hidden=1288, values="around zero"),
    "zeros of both signs, weights, one bias": Case(
        1, hidden=1288, values="around zero", row_weights=True, num_bias=1
    ),
    "logfmt8": Case(1, hidden=200, wire="logfmt8"),
    "logfmt10": Case(1, hidden=136, wire="logfmt10"),
    "logfmt8 of any magnitude": Case(1, hidden=392, wire="logfmt8", values="any magnitude"),
    "logfmt10 of any magnitude": Case(1, hidden=648, wire="logfmt10", values="any magnitude"),
    "logfmt8 for f32 rows": Case(1, hidden=648, wire="logfmt8", dtype=torch.float32),
    # Metadata lie across words.
    "logfmt10 for f32 rows of any magnitude": Case(
        1, hidden=264, wire="logfmt10", dtype=torch.float32, values="any magnitude", num_bias=1
    ),
    "f32 wire for bf16 rows": Case(1, wire="f32"),
    "no token anywhere": Case(1, tokens=(0,)),
    "no token on some ranks": Case(1, tokens=(0, 9, 0, 1)),
    "different token counts": Case(1, tokens=(1, 5, 23, 64)),
    "skewed": Case(1, routing="skewed", tokens=(40,)),
    "all to one rank": Case(1, routing="one rank", tokens=(30,)),
    "mostly dropped": Case(1, routing="sparse"),
    "all dropped": Case(1, routing="dropped", num_bias=1),
    "all dropped by expert": Case(1, routing="dropped", layout="expert", alignment=4),
    "fixed rows": Case(1, fixed_rows=600, tokens=(11, 3)),
    "fixed rows by expert": Case(1, fixed_rows=900, layout="expert", alignment=4),
}
LARGE = {
    "bf16": Case(1, hidden=7168, num_topk=8, experts_per_rank=8, tokens=(150, 0, 61)),
    "bf16 to fp8": Case(1, hidden=7168, num_topk=8, experts_per_rank=8, quantize="fp8"),
    "fp8 pair": Case(1, hidden=7168, num_topk=8, experts_per_rank=8, packed="f32", tokens=(90,)),
    "f32, more than shared memory": Case(1, hidden=81920, dtype=torch.float32, tokens=(3,)),
    "expert layout": Case(1, hidden=4096, layout="expert", alignment=128, tokens=(50,)),
    "top-32 by expert": Case(
        1, experts_per_rank=32, num_topk=32, layout="expert", tokens=(9, 2), row_weights=True
    ),
    "seven experts a rank, aligned": Case(
        1,
        hidden=1040,
        experts_per_rank=7,
        num_topk=6,
        layout="expert",
        alignment=16,
        quantize="fp8",
    ),
    "a tail": Case(1, hidden=2056, tokens=(40,), row_weights=True, num_bias=2),
}
