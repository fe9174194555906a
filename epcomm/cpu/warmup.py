"""Compile the kernels once, in one process, before many ranks would compile them at once.

``python -m epcomm.cpu.warmup`` runs every kernel on one rank without MPI; Numba keeps the result
on disk. A launcher calls it after installing; nothing goes wrong without it, the first calls of
every rank just take a minute.
"""

import itertools
import tempfile
from typing import Literal, get_args

import torch
import torch.distributed as dist

from ..buffer import Buffer
from ..formats import dequantize_fp8, logfmt_decode, logfmt_encode, quantize_fp8
from ..results import Layout

_Quantize = Literal["fp8", "fp8_ue8m0"]
_HIDDEN, _EXPERTS, _TOPK, _TOKENS = 256, 4, 2, 3


def _run_kernels(buffer: Buffer) -> None:
    topk_idx = torch.tensor([[0, 1], [2, 3], [1, -1]])
    weights = torch.rand(_TOKENS, _TOPK)
    layouts: tuple[Layout, ...] = get_args(Layout)
    for layout, dtype in itertools.product(layouts, (torch.bfloat16, torch.float32)):
        x = torch.randn(_TOKENS, _HIDDEN).to(dtype)
        alignment = 2 if layout == "expert" else 1
        recv = buffer.dispatch(x, topk_idx, weights, layout=layout, alignment=alignment)
        buffer.combine(recv.x, recv.handle, topk_weights=recv.topk_weights)
        for quantize in get_args(_Quantize):
            buffer.dispatch(x, quantize=quantize, handle=recv.handle)


def main() -> None:
    """Run dispatch, combine and the codecs in every format."""
    for scale_format in ("f32", "ue8m0"):
        x = torch.randn(_TOKENS, _HIDDEN)
        for rows in (x, x.bfloat16()):
            q, scales = quantize_fp8(rows, scale_format)
            dequantize_fp8(q, scales)
    for bits in (8, 10):
        logfmt_decode(logfmt_encode(x, bits), _HIDDEN, bits, torch.bfloat16)
    with tempfile.TemporaryDirectory() as directory:
        dist.init_process_group(
            "gloo", init_method=f"file://{directory}/store", rank=0, world_size=1
        )
        with Buffer(
            dist.group.WORLD,
            hidden=_HIDDEN,
            num_experts=_EXPERTS,
            num_topk=_TOPK,
            max_tokens=_TOKENS,
        ) as buffer:
            _run_kernels(buffer)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
