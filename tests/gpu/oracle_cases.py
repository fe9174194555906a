"""The cases that the CPU back end is tested with, and some with rows of real size."""

import importlib.util
from pathlib import Path

import torch
from harness import Case

_PATH = Path(__file__).parents[1] / "mpi" / "test_oracle_equality.py"
_SPEC = importlib.util.spec_from_file_location("cpu_cases", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
_MODULE = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_MODULE)

CASES: dict[str, Case] = _MODULE.CASES
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
