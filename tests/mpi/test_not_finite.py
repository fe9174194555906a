"""NaN and infinity in rows: defined, and no other token's business."""

import pytest
import torch
from harness import Case, check, make_buffer, nodes_of
from refusals import arguments, rows


@pytest.mark.parametrize("quantize", ["fp8", "fp8_ue8m0"])
def test_nan_and_infinity_in_fp8(comm, quantize):
    """They become NaN in their place and leave the rest of their tile alone."""
    case = Case(nodes_of(comm.size)[0], hidden=144, tokens=(3,))
    with make_buffer(comm, case) as buffer:
        given = arguments(case, comm)
        topk_idx = torch.tensor([[0, -1, -1]] * 3)
        x = given["x"].clone()
        x[0, 0], x[1, 130], x[2, 5] = float("nan"), float("inf"), float("-inf")
        clean = buffer.dispatch(given["x"].clone(), topk_idx, quantize=quantize)
        recv = buffer.dispatch(x, topk_idx, quantize=quantize)
        places = {(0, 0), (1, 130), (2, 5)}
        for row, (_, token) in enumerate(recv.source.tolist()):
            nan = torch.isnan(recv.x[row].float())
            assert {(token, int(h)) for h in nan.nonzero()} == {p for p in places if p[0] == token}
        assert recv.scales.shape == clean.scales.shape
        check(comm, case, buffer)


@pytest.mark.parametrize("wire", ["bf16", "f32", "logfmt8", "logfmt10"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_in_combine(comm, wire, value):
    """It stays not finite, spoils at most its tile of LogFMT, and no other token."""
    case = Case(1, hidden=144, experts_per_rank=1, num_topk=1, tokens=(2,))
    with make_buffer(comm, case) as buffer:
        far = (comm.rank + 1) % comm.size
        recv = buffer.dispatch(rows(2, 144), torch.tensor([[far], [far]]))
        y = torch.ones(recv.x.shape, dtype=torch.bfloat16)
        y[recv.source[:, 1] == 1, 3] = value
        back = buffer.combine(y, recv.handle, wire=wire).x.float()
        assert (back[0] == 1).all()
        assert not torch.isfinite(back[1, 3])
        spoilt = 128 if wire.startswith("logfmt") and comm.size > 1 else 1
        assert int((~torch.isfinite(back[1])).sum()) == spoilt
        check(comm, case, buffer)
