"""Recorded routings of real models, in the formats that frameworks write."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from .trace_common import RoutingTrace
from .trace_megatron import read_megatron
from .trace_sglang import read_sglang
from .trace_vllm import read_vllm

TraceFormat = Literal["auto", "megatron", "vllm", "sglang"]

_READERS = {"megatron": read_megatron, "vllm": read_vllm, "sglang": read_sglang}
_FORMAT_OF_SUFFIX = {
    ".jsonl": "megatron",
    ".npy": "vllm",
    ".pt": "sglang",
    ".pth": "sglang",
    ".json": "sglang",
}


def load_trace(
    path: str | Path,
    *,
    layer: int | None = None,
    num_experts: int | None = None,
    format: TraceFormat = "auto",  # noqa: A002  the natural word at the call
) -> RoutingTrace:
    """Read the routing of one MoE layer from a trace file.

    ========  ==============  ==========================================  =====================
    format    suffix          content                                     layer None means
    ========  ==============  ==========================================  =====================
    megatron  .jsonl          Megatron-Core router trace                  that of the first line
    vllm      .npy            integers [tokens, MoE layers, top_k]        0
    sglang    .pt .pth .json  recorder, per_token: [layers, tokens, 8]    the first with tokens
    ========  ==============  ==========================================  =====================

    Args:
        path: the file.
        layer: which layer, in the file's own numbering (Megatron, SGLang: the model's layer;
            vLLM: counted over MoE layers).
        num_experts: E, to check the ids against; None takes what the file says, if it does.
        format: ``"auto"`` goes by the suffix. An .npy of SGLang's layout needs ``"sglang"``.

    Raises:
        ValueError: the format is unknown, or the file is damaged: unreadable or cut short,
            a field missing, lengths that disagree, ragged rows, a wrong dtype, an id out of range
            or twice in a row, no such layer. The message names the file, the line or
            array, and the reason.
        OSError: the file cannot be opened.
    """
    path = Path(path)
    name = _FORMAT_OF_SUFFIX.get(path.suffix) if format == "auto" else format
    if name not in _READERS:
        raise ValueError(
            f"format must be one of auto, {', '.join(_READERS)}, got {format!r} for {path} "
            f"(auto knows {', '.join(_FORMAT_OF_SUFFIX)})"
        )
    if num_experts is not None and num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    return _READERS[name](path, layer, num_experts)
