"""SwitchHead attention: value and output projections, or others, are experts, chosen per token and head (arXiv 2312.07987).

There is one attention matrix per head. The layer is written for one process; parallel/parallelize.py narrows the banks and hands it
another dispatcher, and statistics over all ranks. Shape letters: B rows, S positions, M positions of memory and row, T tokens (B rows
of S or M), D model width, H heads, C head width, E experts per head, K choices, R received rows, P output rows. Expert e of head h is
group h*E + e of a bank.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from model.attend import Attend, merge_heads, split_heads
from model.attention_config import DESTINATION_SIDE, SOURCE_SIDE, SwitchHeadConfig
from model.cache import KeyValueCache
from model.context import BatchContext
from model.dispatch import Compute, Dispatcher, LocalDispatcher, Ready, Routing, Then
from model.experts import gate_then_project, project_then_gate
from model.layer import LayerOutput, Linear
from model.parameters import DeclaringModule, ExpertBank, normal
from model.router import (
    Choice,
    Router,
    RouterReport,
    Spread,
    choose,
    kept_experts,
    report,
    sequence_spread,
    switchhead_rows,
)
from model.section import Place
from model.statistics import BatchStatistics, LocalStatistics


class _Routed(NamedTuple):
    """The choice for each expert projection; what each router did with the row's own tokens, not with memory, and its regulariser."""

    choices: Mapping[str, Choice]
    spreads: Mapping[str, Spread]
    reports: Mapping[str, RouterReport]


class SwitchHead(DeclaringModule):
    """Pre-normalised input, no biases, gates without renormalisation; V and O are experts by default, each with its own router.

    K and V, their experts and their router are computed on memory and row; Q and O on the row. Without u, v biases and with a fixed
    scale in the Transformer-XL form. The initial scale is sqrt(2 / L) for L layers, as in the paper's training code.

    The auxiliary loss, one for each router, is entropy_weight * the mean over rows of sum_e p_e log p_e (router.py).
    """

    def __init__(self, config: SwitchHeadConfig, place: Place) -> None:
        super().__init__()
        self.config = config
        self.place = place
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.statistics: BatchStatistics = LocalStatistics()
        self.router_of = config.router_of()
        d_model, head_dim, heads, experts = place.d_model, config.head_dim, config.num_heads, config.num_experts
        std_in = math.sqrt(2 / place.num_layers / d_model)
        std_out = math.sqrt(
            2 / place.num_layers / (heads * head_dim)
        )  # the whole projection's fan-in, not one expert's
        for name in ("query", "key", "value", "output"):
            from_heads = name == "output"
            draw = normal(std_out if from_heads else std_in)
            if name in self.router_of:
                shape = (head_dim, d_model) if from_heads else (d_model, head_dim)
                bank = ExpertBank(heads * experts, {"weight": (shape, draw)}, backend=place.backend)
                self.add_module(f"{name}_experts", bank)
            else:
                sizes = (heads * head_dim, d_model) if from_heads else (d_model, heads * head_dim)
                self.add_module(name, Linear(*sizes, draw=draw))
        for name in dict.fromkeys(self.router_of.values()):
            router = Router(d_model=d_model, num_heads=heads, num_experts=experts, draw=switchhead_rows(std_in))
            self.add_module(f"{name}_router", router)
        self.attend = Attend(config, place, draw=normal(std_in), learned=False)

    def new_cache(self, *, block_length: int) -> KeyValueCache:
        return self.attend.new_cache(block_length=block_length)

    def forward(
        self,
        x_BMD: Tensor,
        context: BatchContext,
        cache: KeyValueCache | None = None,
        raw_BMD: Tensor | None = None,
    ) -> LayerOutput:
        """x (B, M, D): memory, then the row, and raw, which V reads where it is given; y (B, S, D) of the row."""
        dispatcher, heads = self.dispatcher, self.config.num_heads
        x_BSD = x_BMD[:, context.num_memory :]

        # route: all routers read the layer's input, so one exchange of counts serves every projection
        routed = self._route(x_BMD, x_BSD, context)
        routings = [self._routing(name, choice) for name, choice in routed.choices.items()]
        exchanges = dict(zip(routed.choices, dispatcher.plan(*routings), strict=True))

        # V, Q, K: dispatch what goes to experts, the dense ones under it; grouped_matmul, combine
        inputs = {"value": x_BMD if raw_BMD is None else raw_BMD, "query": x_BSD, "key": x_BMD}
        arriving, projected = {}, {}
        for name in [name for name in inputs if name in exchanges]:
            rows = dispatcher.dispatch(exchanges[name], inputs[name].flatten(0, 1), label=name)
            arriving[name] = rows, dispatcher.weights(exchanges[name], label=name)
        for name in [name for name in inputs if name not in exchanges]:
            projected[name] = Ready(split_heads(self.get_submodule(name)(inputs[name]), heads))
        for name, (rows, weights) in arriving.items():
            sums = dispatcher.combine(rows, self._experts(name, weights.wait()), label=name)
            to_heads = partial(_heads_of_pairs, shape=[*inputs[name].shape[:2], heads])
            projected[name] = Then(sums, to_heads)
        q_BHSC, k_BHMC = projected["query"].wait(), projected["key"].wait()
        # attend turns queries and keys to their positions while the values come home
        mixed_BSX = merge_heads(self.attend(q_BHSC, k_BHMC, projected["value"], context, cache))

        # O: dispatch, grouped_matmul, combine
        if "output" in exchanges:
            rows = dispatcher.dispatch(exchanges["output"], mixed_BSX.reshape(-1, self.config.head_dim), label="output")
            weights = dispatcher.weights(exchanges["output"], label="output").wait()
            y_TD = dispatcher.combine(rows, self._experts("output", weights), label="output").wait()
            y_BSD = y_TD.view(x_BSD.shape)
        else:
            y_BSD = self.get_submodule("output")(mixed_BSX)
        return LayerOutput(y_BSD, spreads=routed.spreads, reports=routed.reports)

    def _experts(self, name: str, weights: Mapping[str, Tensor]) -> Compute:
        """grouped_matmul of a projection, its gate on the narrow side."""
        project = gate_then_project if name == "output" else project_then_gate
        how = {"backend": self._bank(name).backend, "num_heads": self.config.num_heads}
        return lambda rows_RX, plan: project(rows_RX, weights["weight"], plan, **how)

    def _bank(self, name: str) -> ExpertBank:
        bank = self.get_submodule(f"{name}_experts")
        assert isinstance(bank, ExpertBank)
        return bank

    def _route(self, x_BMD: Tensor, x_BSD: Tensor, context: BatchContext) -> _Routed:
        choices, spreads, reports = {}, {}, {}
        for name in dict.fromkeys(self.router_of.values()):
            projections = [projection for projection, router in self.router_of.items() if router == name]
            router, reads_memory = self.get_submodule(f"{name}_router"), any(p in SOURCE_SIDE for p in projections)
            x_BXD = x_BMD if reads_memory else x_BSD
            logits_THE = router(x_BXD.flatten(0, 1))
            choice = self._choose(logits_THE, context, router=name, num_memory=x_BXD.shape[1] - x_BSD.shape[1])
            own_logits_THE, *own = (_of_the_row(part, x_BXD, x_BSD) for part in (logits_THE, *choice))
            for projection in projections:
                choices[projection] = Choice(*own) if projection in DESTINATION_SIDE else choice
            reports[name] = report(own_logits_THE, Choice(*own))
            if self.config.entropy_weight > 0:
                logits_BSHE = own_logits_THE.view(*x_BSD.shape[:2], *own_logits_THE.shape[1:])
                weight, per_head = self.config.entropy_weight, self.config.entropy_per_head
                spreads[name] = sequence_spread(logits_BSHE, self.statistics, weight=weight, per_head=per_head)
        return _Routed(choices, spreads, reports)

    def _choose(self, logits_THE: Tensor, context: BatchContext, *, router: str, num_memory: int) -> Choice:
        kept_THE = kept_experts(
            logits_THE,
            context,
            probability=self.config.expert_dropout if self.training else 0.0,
            site=f"{router}_expert",
            num_memory=num_memory,
        )
        return choose(logits_THE, top_k=self.config.top_k, kept_THE=kept_THE, gates=self.config.gates)

    def _routing(self, name: str, choice: Choice) -> Routing:
        """V, Q and K read the token and write (token, head); O reads (token, head) and writes the token."""
        num_tokens, num_heads, num_choices = choice.experts_THK.shape
        device = choice.experts_THK.device
        pair_X = torch.arange(num_tokens * num_heads, device=device)
        token_X = pair_X // num_heads
        first_group_H1 = torch.arange(num_heads, device=device)[:, None] * self.config.num_experts
        to_heads = name != "output"
        return Routing(
            gates_NK=choice.gates_THK.reshape(-1, num_choices),
            expert_ids_NK=(choice.experts_THK + first_group_H1).view(-1, num_choices),
            source_row_N=token_X if to_heads else pair_X,
            output_row_N=pair_X if to_heads else token_X,
            num_rows=num_tokens if to_heads else num_tokens * num_heads,
            num_outputs=num_tokens * num_heads if to_heads else num_tokens,
            bank=self._bank(name),
        )


def _heads_of_pairs(values_XC: Tensor, *, shape: Sequence[int]) -> Tensor:
    """(B*S*H, C) -> (B, H, S, C) for shape (B, S, H)."""
    return values_XC.view(*shape, values_XC.shape[1]).transpose(1, 2)


def _of_the_row(part_THX: Tensor, x_BMD: Tensor, x_BSD: Tensor) -> Tensor:
    """The tokens of the row itself, without those of memory before it."""
    batch, length = x_BMD.shape[:2]
    return part_THX.view(batch, length, *part_THX.shape[1:])[:, length - x_BSD.shape[1] :].flatten(0, 1)


class GatedAttention(DeclaringModule):
    """SwitchHead with a single expert as the authors' library reads it (specs, section 1): V and O are dense, without gates of their own.

    What each head has read is multiplied by a sigmoid gate per (token, head), of a router that reads the row's token. There is nothing
    to choose, so there is no bank, no report and no loss.
    """

    def __init__(self, config: SwitchHeadConfig, place: Place) -> None:
        super().__init__()
        self.place = place
        self.num_heads = heads = config.num_heads
        d_model, inner_dim = place.d_model, config.num_heads * config.head_dim
        std_in = math.sqrt(2 / place.num_layers / d_model)
        self.query = Linear(d_model, inner_dim, draw=normal(std_in))
        self.key = Linear(d_model, inner_dim, draw=normal(std_in))
        self.value = Linear(d_model, inner_dim, draw=normal(std_in))
        self.output = Linear(inner_dim, d_model, draw=normal(math.sqrt(2 / place.num_layers / inner_dim)))
        self.output_router = Router(d_model=d_model, num_heads=heads, num_experts=1, draw=switchhead_rows(std_in))
        self.attend = Attend(config, place, draw=normal(std_in), learned=False)

    def new_cache(self, *, block_length: int) -> KeyValueCache:
        return self.attend.new_cache(block_length=block_length)

    def forward(
        self,
        x_BMD: Tensor,
        context: BatchContext,
        cache: KeyValueCache | None = None,
        raw_BMD: Tensor | None = None,
    ) -> LayerOutput:
        """x (B, M, D): memory, then the row, and raw, which V reads where it is given; y (B, S, D) of the row."""
        x_BSD = x_BMD[:, context.num_memory :]
        gates_BSH = self.output_router(x_BSD.flatten(0, 1)).sigmoid().view(*x_BSD.shape[:2], self.num_heads)
        values_BMD = x_BMD if raw_BMD is None else raw_BMD
        heads = (
            split_heads(p(x), self.num_heads)
            for p, x in ((self.query, x_BSD), (self.key, x_BMD), (self.value, values_BMD))
        )
        q_BHSC, k_BHMC, v_BHMC = heads
        mixed_BHSC = self.attend(q_BHSC, k_BHMC, Ready(v_BHMC), context, cache)
        gated_BHSC = (mixed_BHSC * gates_BSH.transpose(1, 2)[..., None]).to(mixed_BHSC.dtype)
        return LayerOutput(self.output(merge_heads(gated_BHSC)))
