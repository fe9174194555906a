"""Speed of the wire-format codecs on one core, beside a copy and torch's own FP8 cast.

GB/s counts the bytes of the row as BF16 (2 per element) per second of the codec's time, whatever it
reads or writes: so all lines of the table compare directly, and 1 / GB/s is the cost of a row.
Candidates run interleaved, in a new order each round; the table gives medians over the rounds. The
working set is one batch, so with small sizes it is cache speed that is measured.

    python benchmarks/codecs.py --tokens 512 --hidden 7168
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from epcomm.formats import WireFormat, batch, reference
from epcomm.formats.constants import TILE, tiles_of

Codec = Callable[[], object]


def _check(tokens: int, hidden: int) -> None:
    """Compare every codec timed below with the reference on a few rows; raise on a difference."""
    x = torch.randn(min(tokens, 4), hidden).bfloat16()
    codecs, state = _codecs(x)
    for run in codecs.values():
        run()
    values = x.float().numpy()

    def same(name: str, got: np.ndarray, expected: np.ndarray) -> None:
        if got.tobytes() != np.ascontiguousarray(expected).tobytes():
            raise AssertionError(f"{name} differs from the reference")

    codes, scales = reference.fp8_encode(values, "f32")
    same("fp8 pack", state["fp8"], codes)
    same("fp8 scales", state["fp8_scales"], scales)
    same("fp8 unpack", state["fp8_f32"], reference.fp8_decode(codes, scales, "f32"))
    codes, scales = reference.fp8_encode(values, "ue8m0")
    same("fp8_ue8m0 pack", state["ue8m0"], codes)
    same("fp8_ue8m0 scales", state["ue8m0_scales"], scales)
    same("fp8_ue8m0 unpack", state["ue8m0_f32"], reference.fp8_decode(codes, scales, "ue8m0"))
    for bits in (8, 10):
        data = reference.logfmt_encode(values, bits)
        decoded = reference.logfmt_decode(data, hidden, bits)
        same(f"logfmt{bits} pack", state[f"logfmt{bits}"], data)
        same(f"logfmt{bits} unpack", state[f"logfmt{bits}_f32"], decoded)
    same("bf16 pack", state["bf16"], reference.f32_to_bf16(values))
    same("bf16 unpack", state["bf16_f32"], values)
    torch_codes = state["torch"].view(torch.uint8).numpy()
    if hidden % TILE == 0:
        same("torch cast", torch_codes, reference.fp8_encode(values, "f32")[0])


def _torch_cast(x: torch.Tensor, out: torch.Tensor) -> None:
    """Quantise with torch alone; hidden must be whole tiles, the remainder is left out."""
    whole = x.shape[1] // TILE * TILE
    tiles = x[:, :whole].float().view(len(x), -1, TILE)
    amax = tiles.abs().amax(-1, keepdim=True).clamp(min=1e-4)
    q = (tiles * (torch.full_like(amax, 448.0) / amax)).to(torch.float8_e4m3fn)
    out[:, :whole] = q.view(len(x), whole)


def _codecs(x: torch.Tensor) -> tuple[dict[str, Codec], dict]:
    """Bind every codec to its buffers: candidates by name, and the buffers they fill."""
    T, H = x.shape
    u16 = x.view(torch.int16).numpy().view(np.uint16)
    f32 = x.float().numpy()
    empty = np.empty
    s: dict = {
        "copy": np.empty_like(u16),
        "bf16": np.empty_like(u16),
        "torch": torch.zeros(T, H, dtype=torch.float8_e4m3fn),
        "fp8": empty((T, H), np.uint8),
        "fp8_scales": empty((T, tiles_of(H)), np.float32),
        "ue8m0": empty((T, H), np.uint8),
        "ue8m0_scales": empty((T, WireFormat.FP8_UE8M0.scale_bytes(H)), np.uint8),
    }
    for name in ("bf16", "fp8", "ue8m0", "logfmt8", "logfmt10"):
        s[f"{name}_f32"] = empty((T, H), np.float32)
    for bits in (8, 10):
        s[f"logfmt{bits}"] = empty((T, reference.logfmt_row_bytes(H, bits)), np.uint8)
    codecs: dict[str, Codec] = {
        "copy of the BF16 bytes": lambda: np.copyto(s["copy"], u16),
        "torch: cast BF16 to FP8": lambda: _torch_cast(x, s["torch"]),
        "bf16: f32 to bf16": lambda: batch.bf16_pack(f32, s["bf16"]),
        "bf16: bf16 to f32": lambda: batch.bf16_unpack(u16, s["bf16_f32"]),
        "fp8: pack bf16": lambda: batch.fp8_pack_bf16(u16, s["fp8"], s["fp8_scales"]),
        "fp8: unpack to f32": lambda: batch.fp8_unpack_f32(s["fp8"], s["fp8_scales"], s["fp8_f32"]),
        "fp8_ue8m0: pack bf16": lambda: batch.fp8_pack_bf16_ue8m0(
            u16, s["ue8m0"], s["ue8m0_scales"]
        ),
        "fp8_ue8m0: unpack to f32": lambda: batch.fp8_unpack_f32_ue8m0(
            s["ue8m0"], s["ue8m0_scales"], s["ue8m0_f32"]
        ),
        "logfmt8: pack f32": lambda: batch.logfmt_pack_f32(f32, 8, s["logfmt8"]),
        "logfmt8: unpack to f32": lambda: batch.logfmt_unpack_f32(
            s["logfmt8"], 8, s["logfmt8_f32"]
        ),
        "logfmt10: pack f32": lambda: batch.logfmt_pack_f32(f32, 10, s["logfmt10"]),
        "logfmt10: unpack to f32": lambda: batch.logfmt_unpack_f32(
            s["logfmt10"], 10, s["logfmt10_f32"]
        ),
    }
    return codecs, s


def measure(tokens: int, hidden: int, rounds: int) -> dict[str, float]:
    """Median seconds of each candidate over ``rounds`` interleaved rounds, after two unmeasured."""
    codecs, _ = _codecs(torch.randn(tokens, hidden).bfloat16())
    seconds: dict[str, list[float]] = {name: [] for name in codecs}
    names = list(codecs)
    order = np.random.default_rng(0)
    for turn in range(rounds + 2):
        for name in order.permutation(names):
            start = time.perf_counter()
            codecs[name]()
            elapsed = time.perf_counter() - start
            if turn >= 2:
                seconds[name].append(elapsed)
    return {name: statistics.median(seconds[name]) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=256, help="rows of a batch")
    parser.add_argument("--hidden", type=int, default=7168, help="elements of a row")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    _check(args.tokens, args.hidden)
    medians = measure(args.tokens, args.hidden, args.rounds)
    bf16_bytes = 2 * args.tokens * args.hidden
    rates = {name: bf16_bytes / s / 1e9 for name, s in medians.items()}
    if args.json:
        print(json.dumps({"settings": vars(args), "gb_per_s_of_bf16": rates}))
        return
    print(f"{args.tokens} x {args.hidden}, one core, median of {args.rounds} interleaved rounds")
    print("GB/s = 2 bytes x elements / time, for every line; all codecs checked first")
    print(f"{'':28s} {'GB/s':>7s} {'us/row':>8s} {'x copy':>7s}")
    copy = rates["copy of the BF16 bytes"]
    for name, rate in rates.items():
        per_row = medians[name] / args.tokens * 1e6
        print(f"{name:28s} {rate:7.2f} {per_row:8.2f} {copy / rate:7.1f}")


if __name__ == "__main__":
    main()
