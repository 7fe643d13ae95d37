"""sigma-MoE feed-forward: sigmoid-gated ReLU experts (Csordas et al., arXiv 2310.10837).

The layer is written for one process; parallel/parallelize.py narrows the bank and hands it another dispatcher and statistics over all
ranks. Shape letters: B rows, S positions, T = B*S tokens, D model width, F expert width, E experts, K choices, R received rows,
P output rows.
"""

import math

import torch
from torch import Tensor

from model.context import BatchContext
from model.dispatch import Dispatcher, LocalDispatcher, Routing
from model.experts import gated_mlp
from model.feedforward_config import SigmaMoEConfig
from model.layer import LayerOutput
from model.parameters import DeclaringModule, ExpertBank, normal
from model.router import Choice, Router, batch_spread, choose, kept_experts, report, sigma_moe_rows
from model.section import Place
from model.statistics import BatchStatistics, LocalStatistics


class SigmaMoE(DeclaringModule):
    """y = sum over the K best experts e of sigmoid(s_e) * relu(x W1_e) W2_e; no biases, gates not renormalised.

    The auxiliary loss is entropy_weight * sum_e p_e log p_e of the mean router distribution over the micro-step's rows on all ranks.
    """

    def __init__(self, config: SigmaMoEConfig, place: Place) -> None:
        super().__init__()
        self.config = config
        self.place = place
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.statistics: BatchStatistics = LocalStatistics()
        d_model, experts, width = place.d_model, config.num_experts, config.expert_dim
        std_in = math.sqrt(2 / place.num_layers / d_model)
        std_out = math.sqrt(
            2 / place.num_layers / (experts * width)
        )  # the fan-in of the whole layer, never of one expert
        self.router = Router(d_model=d_model, num_heads=1, num_experts=experts, draw=sigma_moe_rows(std_in))
        up, down = ((d_model, width), normal(std_in)), ((width, d_model), normal(std_out))
        self.experts = ExpertBank(experts, {"up": up, "down": down})

    def forward(
        self,
        x_BSD: Tensor,
        context: BatchContext,
        carry_TX: Tensor | None = None,
        raw_BSD: Tensor | None = None,
    ) -> LayerOutput:
        """y (B, S, D). The router reads x; the experts read raw instead where it is given (`model.norm: peri`)."""
        batch, length, d_model = x_BSD.shape
        x_TD = x_BSD.reshape(-1, d_model)

        # route
        logits_T1E = self.router(x_TD)
        probability = self.config.expert_dropout if self.training else 0.0
        kept_T1E = kept_experts(logits_T1E, context, probability=probability, site="mlp_expert")
        choice = choose(logits_T1E, top_k=self.config.top_k, kept_THE=kept_T1E)
        (exchange,) = self.dispatcher.plan(self._routing(choice))

        # dispatch, grouped_matmul twice, combine
        rows_TD = x_TD if raw_BSD is None else raw_BSD.reshape(-1, d_model)
        arriving = self.dispatcher.dispatch(exchange, rows_TD, label="mlp")
        gathering = self.dispatcher.weights(exchange)
        spreads = {}
        if self.config.entropy_weight > 0:
            spreads["mlp"] = batch_spread(logits_T1E, self.statistics, weight=self.config.entropy_weight)
        (rows_RD, plan), weights = arriving.wait(), gathering.wait()
        partials_PD = gated_mlp(rows_RD, weights["up"], weights["down"], plan, backend=self.place.backend)
        y_TD = self.dispatcher.combine(exchange, partials_PD, label="mlp").wait()

        reports = {"mlp": report(logits_T1E, choice)}
        return LayerOutput(y_TD.view(batch, length, d_model), spreads=spreads, reports=reports)

    def _routing(self, choice: Choice) -> Routing:
        """Reads the token and writes the token."""
        num_tokens = choice.experts_THK.shape[0]
        tokens_N = torch.arange(num_tokens, device=choice.experts_THK.device)
        return Routing(
            gates_NK=choice.gates_THK[:, 0],
            expert_ids_NK=choice.experts_THK[:, 0],
            source_row_N=tokens_N,
            output_row_N=tokens_N,
            num_rows=num_tokens,
            num_outputs=num_tokens,
            bank=self.experts,
        )
