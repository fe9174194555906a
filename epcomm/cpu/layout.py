"""Layout: from one rank's choices to counts and indices."""

from typing import NamedTuple

import numpy as np

from .memory import kernel


class Layout(NamedTuple):
    """Where one source's tokens go, without knowing anybody else's.

    Attributes:
        index_TK: index of token t among this source's rows at the rank (layout rank) or at the
            expert (layout expert) of its k-th choice, int32; -1 where dropped.
        slot_TN: index of token t's record among this source's records to node n, int32; -1 where
            it has none.
        node_tokens_N, rank_rows_R, expert_rows_E: counts, int32.
    """

    index_TK: np.ndarray
    slot_TN: np.ndarray
    node_tokens_N: np.ndarray
    rank_rows_R: np.ndarray
    expert_rows_E: np.ndarray


class BadChoice(NamedTuple):
    """The first choice that cannot be routed."""

    token: int
    choice: int
    duplicate: bool

    def error(self, topk_idx_TK: np.ndarray, num_experts: int) -> ValueError:
        """The error that tells the user."""
        value = int(topk_idx_TK[self.token, self.choice])
        if self.duplicate:
            return ValueError(
                f"topk_idx: expert {value} appears twice in row {self.token}; "
                "the experts of a token must be distinct"
            )
        return ValueError(
            f"topk_idx[{self.token}, {self.choice}] is {value}; expected an expert id in "
            f"0..{num_experts - 1}, or -1 for a dropped choice"
        )


@kernel
def _fill(
    topk_idx_TK: np.ndarray,
    node_of_R: np.ndarray,
    experts_per_rank: int,
    by_expert: bool,
    layout: Layout,
) -> tuple[int, int, bool]:
    num_tokens, num_topk = topk_idx_TK.shape
    num_experts = layout.expert_rows_E.size
    seen_E = np.full(num_experts, -1, np.int32)  # last token that chose the expert
    seen_R = np.full(node_of_R.size, -1, np.int32)
    for t in range(num_tokens):
        for k in range(num_topk):
            expert = topk_idx_TK[t, k]
            layout.index_TK[t, k] = -1
            if expert == -1:
                continue
            if expert < -1 or expert >= num_experts:
                return t, k, False
            if seen_E[expert] == t:
                return t, k, True
            seen_E[expert] = t
            rank = expert // experts_per_rank
            if seen_R[rank] != t:
                seen_R[rank] = t
                layout.rank_rows_R[rank] += 1
                node = node_of_R[rank]
                if layout.slot_TN[t, node] < 0:
                    layout.slot_TN[t, node] = layout.node_tokens_N[node]
                    layout.node_tokens_N[node] += 1
            if by_expert:
                layout.index_TK[t, k] = layout.expert_rows_E[expert]
            else:
                layout.index_TK[t, k] = layout.rank_rows_R[rank] - 1
            layout.expert_rows_E[expert] += 1
    return -1, -1, False


def make_layout(
    topk_idx_TK: np.ndarray, node_of_R: np.ndarray, num_experts: int, by_expert: bool
) -> Layout | BadChoice:
    """Count and index ``topk_idx_TK`` (int64); a BadChoice names the first invalid entry."""
    num_tokens, num_topk = topk_idx_TK.shape
    num_nodes = int(node_of_R.max()) + 1
    layout = Layout(
        np.empty((num_tokens, num_topk), np.int32),
        np.full((num_tokens, num_nodes), -1, np.int32),
        np.zeros(num_nodes, np.int32),
        np.zeros(node_of_R.size, np.int32),
        np.zeros(num_experts, np.int32),
    )
    token, choice, duplicate = _fill(
        topk_idx_TK, node_of_R, num_experts // node_of_R.size, by_expert, layout
    )
    return layout if token < 0 else BadChoice(token, choice, duplicate)
