"""Routers: from hidden states to gates and expert ids, in float32 whatever the run's dtype.

Owns the scores, the selection and the entropy regulariser. Does not own what the chosen experts compute (switchhead.py,
sigma_moe.py) nor how rows travel (dispatch.py). Shape letters: T tokens (B rows of S positions), H heads, E experts per head, K choices.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from model.context import BatchContext, keep_mask
from model.parameters import DeclaringModule, Initializer, normal
from model.statistics import BatchStatistics


class RouterReport(NamedTuple):
    """What a router did with this rank's rows, for metrics: no gradient, float32.

    count_G: routed copies per expert group. probability_G: sum over rows of the softmax of the logits. num_rows: rows counted (0-dim).
    """

    count_G: Tensor
    probability_G: Tensor
    num_rows: Tensor


class Choice(NamedTuple):
    """A router's decision: gates and expert ids within the head, (T, H, K) each, K descending by score."""

    gates_THK: Tensor
    experts_THK: Tensor


class Router(DeclaringModule):
    """A linear map from D to H*E logits without bias, kept in float32 (SwitchHead: arXiv 2312.07987; sigma-MoE: arXiv 2310.10837).

    `draw` initialises the (H*E, D) weight; row h*E + e scores expert e of head h.
    """

    weight: Tensor

    def __init__(self, *, d_model: int, num_heads: int, num_experts: int, draw: Initializer) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_experts = num_experts
        self.declare("weight", (num_heads * num_experts, d_model), draw)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Logits (T, H, E), float32."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits = torch.nn.functional.linear(x_TD.to(self.weight.dtype), self.weight)
        return logits.view(-1, self.num_heads, self.num_experts)


def choose(
    logits_THE: Tensor, *, top_k: int, kept_THE: Tensor | None = None, gates: Literal["sigmoid", "softmax"] = "sigmoid"
) -> Choice:
    """The K best experts of each (token, head), with gate sigmoid(logit), or softmax over the K logits as in MoA; not renormalised.

    kept_THE: bool, False where expert dropout takes an expert out of the *ranking*; gates are read from the untouched logits, so a
    pick forced on a dropped expert still has a finite gate. Among equal scores the lowest id wins (torch.topk promises no order).
    """
    scores_THE = logits_THE.detach()
    if kept_THE is not None:
        scores_THE = scores_THE.masked_fill(~kept_THE, -torch.inf)
    experts_THK = scores_THE.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    chosen_THK = logits_THE.gather(-1, experts_THK)
    return Choice(chosen_THK.softmax(-1) if gates == "softmax" else chosen_THK.sigmoid(), experts_THK)


def kept_experts(
    logits_THE: Tensor, context: BatchContext, *, probability: float, site: str, depth: int, num_memory: int = 0
) -> Tensor | None:
    """bool (T, H, E), one draw for each token, head and expert, for `choose`; None where nothing is dropped.

    num_memory: how many of each row's positions, the first ones, are memory. Their masks have a key of their own, so that memory leaves
    the masks of the row's own tokens alone.
    """
    if probability == 0.0:
        return None
    num_tokens, num_heads, num_experts = logits_THE.shape
    length = num_tokens // len(context.positions_B) - num_memory if num_tokens else 0
    chance = {"probability": probability, "depth": depth}
    keep_BSX = keep_mask(context, length, num_heads * num_experts, site=site, **chance)
    if num_memory:
        memory_BSX = keep_mask(context, num_memory, num_heads * num_experts, site=f"{site}/memory", **chance)
        keep_BSX = torch.cat([memory_BSX, keep_BSX], dim=1)
    return keep_BSX.view(num_tokens, num_heads, num_experts)


def negative_entropy(logits_TE: Tensor, statistics: BatchStatistics) -> Tensor:
    """sum_e p_e log p_e of p = the mean over the micro-step's rows on all ranks of softmax(logits); in [-log E, 0].

    sigma-MoE's regulariser before its weight gamma (arXiv 2310.10837): minimising it spreads the load. The mean comes before the
    entropy, and the softmax is taken although the gate is a sigmoid.
    """
    mean_E = statistics.mean(logits_TE.softmax(-1))
    return (mean_E * mean_E.clamp_min(torch.finfo(mean_E.dtype).tiny).log()).sum()


def sequence_negative_entropy(logits_BSHE: Tensor, statistics: BatchStatistics) -> Tensor:
    """SwitchHead's optional regulariser before its weight delta (specs of arXiv 2312.07987, section 3); in [-log E, 0].

    The mean over the micro-step's rows on all ranks of sum_e p_e log p_e, where p is a row's mean over positions and heads of
    softmax(logits).
    """
    mean_BE = logits_BSHE.softmax(-1).mean((1, 2))
    return statistics.mean((mean_BE * mean_BE.clamp_min(torch.finfo(mean_BE.dtype).tiny).log()).sum(-1))


@torch.no_grad()
def report(logits_THE: Tensor, choice: Choice) -> RouterReport:
    """Counts and probabilities per group h*E + e, for the metrics."""
    num_tokens, num_heads, num_experts = logits_THE.shape
    groups_THK = choice.experts_THK + torch.arange(num_heads, device=logits_THE.device)[:, None] * num_experts
    ones = logits_THE.new_ones(groups_THK.numel())
    return RouterReport(
        logits_THE.new_zeros(num_heads * num_experts).index_add_(0, groups_THK.flatten(), ones),
        logits_THE.softmax(-1).sum(0).flatten(),
        torch.tensor(float(num_tokens), device=logits_THE.device),
    )


def switchhead_rows(std: float) -> Initializer:
    """SwitchHead's router initialisation: normal rows, each set to norm (own std) / (global std after normalising).

    It nearly restores the original row norms, as in the authors' code; it does not make them equal.
    """
    return _renormalised(std, lambda rows: rows.std(dim=1, keepdim=True))


def sigma_moe_rows(std: float) -> Initializer:
    """sigma-MoE's router initialisation: all rows of equal norm, the global standard deviation kept."""
    return _renormalised(std, lambda rows: rows.std())


def _renormalised(std: float, target_std: Callable[[Tensor], Tensor]) -> Initializer:
    def draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        rows = normal(std)(shape, generator)
        unit = rows / rows.norm(dim=1, keepdim=True)
        return unit * (target_std(rows) / unit.std())

    return draw
