"""Routers: from hidden states to gates and expert ids, in float32 whatever the run's dtype.

Owns the scores, the ranking, the gates, the entropy regulariser and what is told of the loads. Does not own the rivals of sigma-MoE's
router (selection.py, recurrent_router.py), what the chosen experts compute (switchhead.py, sigma_moe.py) nor how rows travel
(dispatch.py). Shape letters: T tokens (B rows of S positions), H heads, E experts per head, G = H*E groups, K choices.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from model.context import BatchContext, keep_mask
from model.parameters import DeclaringModule, Initializer, normal
from model.statistics import BatchStatistics

Gates = Literal["sigmoid", "softmax", "softmax_of_all", "open"]
COLLAPSED = 0.1  # a `load_spread` below this is worth an alarm


class RouterReport(NamedTuple):
    """What a router did with this rank's rows, for metrics: no gradient, float32.

    count_G: routed copies per expert group. probability_G: sum over rows of the softmax of the logits. num_rows: rows counted (0-dim).
    """

    count_G: Tensor
    probability_G: Tensor
    num_rows: Tensor

    def plus(self, other: "RouterReport") -> "RouterReport":
        """Of the rows of both."""
        return RouterReport(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


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
        self.declare("weight", (num_heads * num_experts, d_model), draw, decays=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Logits (T, H, E), float32."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits = torch.nn.functional.linear(x_TD.to(self.weight.dtype), self.weight)
        return logits.view(-1, self.num_heads, self.num_experts)


def average_key_logits(x_TD: Tensor, averages_ED: Tensor) -> Tensor:
    """Logits (T, 1, E) of Avg-K (arXiv 2305.13999): x . the mean of an expert's input weights, its mean pre-activation; float32.

    The gates are open there, so these averages learn from a regulariser alone, and the experts from their own output.
    """
    with torch.autocast(x_TD.device.type, enabled=False):
        return torch.nn.functional.linear(x_TD.to(averages_ED.dtype), averages_ED)[:, None]


def choose(
    logits_THE: Tensor,
    *,
    top_k: int,
    kept_THE: Tensor | None = None,
    offsets_HE: Tensor | None = None,
    gates: Gates = "sigmoid",
) -> Choice:
    """The K best experts of each (token, head), and their gates, which are not renormalised.

    gates: sigmoid of the logit; softmax over the K logits as in MoA; softmax_of_all: over all E, as in Switch; open: 1.
    kept_THE: bool, False where expert dropout takes an expert out of the *ranking*. offsets_HE: added to the logits in the ranking.
    Gates are read from the untouched logits, so a pick forced on a dropped expert still has a finite gate.
    """
    scores_THE = logits_THE.detach()
    if offsets_HE is not None:
        scores_THE = scores_THE + offsets_HE
    if kept_THE is not None:
        scores_THE = scores_THE.masked_fill(~kept_THE, -torch.inf)
    experts_THK = best(scores_THE, top_k)
    if gates == "open":
        return Choice(torch.ones_like(scores_THE[..., :top_k]), experts_THK)
    if gates == "softmax_of_all":
        return Choice(logits_THE.softmax(-1).gather(-1, experts_THK), experts_THK)
    chosen_THK = logits_THE.gather(-1, experts_THK)
    return Choice(chosen_THK.softmax(-1) if gates == "softmax" else chosen_THK.sigmoid(), experts_THK)


def best(scores_THE: Tensor, top_k: int) -> Tensor:
    """Ids (T, H, K) of the highest scores, best first; among equal ones the lowest id wins (torch.topk promises no order)."""
    return scores_THE.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]


def kept_experts(
    logits_THE: Tensor, context: BatchContext, *, probability: float, site: str, num_memory: int = 0
) -> Tensor | None:
    """bool (T, H, E), one draw for each token, head and expert, for `choose`; None where nothing is dropped.

    num_memory: how many of each row's positions, the first ones, are memory. Their masks have a key of their own, so that memory leaves
    the masks of the row's own tokens alone.
    """
    if probability == 0.0:
        return None
    num_tokens, num_heads, num_experts = logits_THE.shape
    length = num_tokens // len(context.positions_B) - num_memory if num_tokens else 0
    keep_BSX = keep_mask(context, length, num_heads * num_experts, probability=probability, site=site)
    if num_memory:
        memory_BSX = keep_mask(
            context, num_memory, num_heads * num_experts, probability=probability, site=f"{site}/memory"
        )
        keep_BSX = torch.cat([memory_BSX, keep_BSX], dim=1)
    return keep_BSX.view(num_tokens, num_heads, num_experts)


class Spread(NamedTuple):
    """A router's entropy regulariser: weight * mean over X of sum_e p_e log p_e, which is least where the load is spread evenly.

    probability_XE: mean probabilities, one row for each sequence of this rank, or one row in all if the mean is already over all rows of
    all ranks. statistics: takes the mean over the sequences of all ranks; None for the one row.
    """

    weight: float
    probability_XE: Tensor
    statistics: BatchStatistics | None


def batch_spread(logits_THE: Tensor, statistics: BatchStatistics, *, weight: float) -> Spread:
    """sigma-MoE's (arXiv 2310.10837): p is the mean over the micro-step's rows on all ranks of softmax(logits), per head.

    The mean comes before the entropy, and the softmax is taken although the gate is a sigmoid.
    """
    return Spread(weight, statistics.mean(logits_THE.softmax(-1)), None)


def sequence_spread(
    logits_BSHE: Tensor, statistics: BatchStatistics, *, weight: float, per_head: bool = False
) -> Spread:
    """SwitchHead's (specs of arXiv 2312.07987, section 3): p is a row's mean over positions and heads of softmax(logits).

    per_head: over positions alone, for each head, as in MoEUT (arXiv 2405.16039).
    """
    mean_BHE = logits_BSHE.softmax(-1).mean(1)
    return Spread(weight, mean_BHE.flatten(0, 1) if per_head else mean_BHE.mean(1), statistics)


def entropy_loss(repeats: Sequence[Spread]) -> Tensor:
    """The loss of one router, whose layer was used once for each of `repeats`: their probabilities are averaged first (MoEUT)."""
    weight, _, statistics = repeats[0]
    mean_XE = torch.stack([spread.probability_XE for spread in repeats]).mean(0)
    negative_entropy_X = (mean_XE * mean_XE.clamp_min(torch.finfo(mean_XE.dtype).tiny).log()).sum(-1)
    return weight * (negative_entropy_X.mean() if statistics is None else statistics.mean(negative_entropy_X))


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


def load_spread(report: RouterReport) -> Tensor:
    """float32 (H,), of reports of all ranks: how evenly each head's copies are spread over its experts.

    0: K experts take every row, the rest nothing. 1: as even as the number of copies allows. Between them, where exp(entropy of the
    loads), the number of experts that are in use in effect, lies on the way from K to the smaller of E and the number of copies. A
    head without a choice (K = E, or a single row) counts as 1. Where a row has K >= E copies, which only heads that share experts can
    bring about (tables), K falls away: one expert could take them all.
    """
    num_rows = report.num_rows.clamp_min(1)
    heads = max(1, round(float(report.probability_G.sum() / num_rows)))  # each head's probabilities sum to 1 per row
    count_HE = report.count_G.view(heads, -1)
    copies_H = count_HE.sum(1)
    share_HE = count_HE / copies_H[:, None].clamp_min(1)
    in_use_H = torch.exp(-(share_HE * share_HE.clamp_min(torch.finfo(share_HE.dtype).tiny).log()).sum(1))
    fewest_H = copies_H / num_rows
    fewest_H = torch.where(fewest_H >= count_HE.shape[1], torch.ones_like(fewest_H), fewest_H)
    most_H = copies_H.clamp_max(count_HE.shape[1])
    spread_H = (in_use_H - fewest_H) / (most_H - fewest_H)
    return torch.where(most_H > fewest_H, spread_H.clamp(0.0, 1.0), torch.ones_like(spread_H))


def collapse_alarm(reports: Mapping[str, RouterReport]) -> str | None:
    """The sentence that names the routers of which a head has collapsed, reports by layer and router; None if there is none."""
    spreads = {name: float(load_spread(report).min()) for name, report in reports.items()}
    collapsed = {name: spread for name, spread in spreads.items() if spread < COLLAPSED}
    if not collapsed:
        return None
    return (
        f"the load must be spread over the experts (load_spread at least {COLLAPSED}), but few experts take nearly all tokens in "
        f"{', '.join(f'{name} ({spread:.3f})' for name, spread in collapsed.items())}: raise the layer's entropy_weight (sigma_moe also "
        "has load_weight, and balance: bias; pkm and peer have query_norm: batch) or lower optim.lr"
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
