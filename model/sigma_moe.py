"""sigma-MoE feed-forward: gated ReLU experts (Csordas et al., arXiv 2310.10837), with its own router or a rival's.

The layer is written for one process; parallel/parallelize.py narrows the bank and hands it another dispatcher and statistics over all
ranks. What distinguishes the routers is in selection.py and recurrent_router.py. Shape letters: B rows, S positions, T = B*S tokens,
D model width, F expert width, E experts, K choices, R received rows, C routed copies here, P output rows, X width of a router's state.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from model.context import BatchContext, dropout, token_hashes
from model.dispatch import Dispatcher, LocalDispatcher, LocalPlan, Routing
from model.experts import gated_mlp, hidden_factors
from model.feedforward_config import SigmaMoEConfig
from model.layer import LayerOutput, Linear
from model.parameters import DeclaringModule, ExpertBank, normal
from model.recurrent_router import ROUTER_DIM, RecurrentRouter
from model.router import (
    Choice,
    Router,
    RouterReport,
    Spread,
    average_key_logits,
    batch_spread,
    report,
    sequence_spread,
    sigma_moe_rows,
)
from model.section import Place
from model.selection import Selection, load_loss
from model.statistics import BatchStatistics, LocalStatistics


class _Losses(NamedTuple):
    """The load loss, if there is one, and the entropy regulariser by router, if there is one."""

    load: tuple[Tensor, ...]
    spreads: dict[str, Spread]


class SigmaMoE(DeclaringModule):
    """y = sum over the K best experts e of gate_e * relu(x W1_e) W2_e, plus the shared experts; no biases, gates not renormalised.

    sigma-MoE's own gate is sigmoid(s_e); selection.py has those of its rivals. Auxiliary losses: entropy_weight * sum_e p_e log p_e of
    the mean router distribution, over the micro-step's rows on all ranks or over each sequence, and Switch's load loss.
    """

    def __init__(self, config: SigmaMoEConfig, place: Place) -> None:
        super().__init__()
        self.config = config
        self.place = place
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.statistics: BatchStatistics = LocalStatistics()
        d_model, experts, width = place.d_model, config.num_experts, config.expert_dim
        shared_dim = config.num_shared_experts * width
        # the fan-in of the whole layer, unless the ablation asks for that of one expert
        fan_in = width if config.initialisation == "standard" else experts * width + shared_dim
        variance = 2 / place.num_layers * config.init_scale
        std_in, draw_down = math.sqrt(variance / d_model), normal(math.sqrt(variance / fan_in))
        if config.router == "recurrent":
            dim = config.router_dim or ROUTER_DIM
            self.router = RecurrentRouter(place, dim=dim, num_experts=experts, draw_input=normal(std_in))
        elif config.router != "average_keys":
            draw = normal(std_in) if config.router == "switch" else sigma_moe_rows(std_in)
            self.router = Router(d_model=d_model, num_heads=1, num_experts=experts, draw=draw)
        self.selection = Selection(config, place)
        up, down = ((d_model, width), normal(std_in)), ((width, d_model), draw_down)
        self.experts = ExpertBank(experts, {"up": up, "down": down}, backend=place.backend)
        if shared_dim:
            self.shared_up = Linear(d_model, shared_dim, draw=normal(std_in))
            self.shared_down = Linear(shared_dim, d_model, draw=draw_down)

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
        raw_BSD = x_BSD if raw_BSD is None else raw_BSD

        # route
        logits_T1E, carry_TX = self._score(x_TD, carry_TX)
        choice = self.selection(logits_T1E, x_TD, context, self.statistics)
        (exchange,) = self.dispatcher.plan(self._routing(choice, context, length))

        # dispatch; under it what needs no expert
        arriving = self.dispatcher.dispatch(exchange, raw_BSD.reshape(-1, d_model), label="mlp")
        gathering = self.dispatcher.weights(exchange, label="mlp")
        shared_BSD = self._shared(raw_BSD, context) if self.config.num_shared_experts else None
        losses = self._regularise(logits_T1E.view(batch, length, *logits_T1E.shape[1:]), choice)
        reports = {"mlp": report(logits_T1E, choice)}

        # grouped_matmul twice, combine
        experts = partial(self._experts, gathering.wait())
        y_BSD = self.dispatcher.combine(arriving, experts, label="mlp").wait().view(batch, length, d_model)
        if shared_BSD is not None:
            y_BSD = y_BSD + shared_BSD
        return LayerOutput(y_BSD, losses.load, spreads=losses.spreads, reports=reports, carry_TX=carry_TX)

    @property
    def balances(self) -> bool:
        """The layer wants to be told the loads of each optimizer step."""
        return self.config.balance == "bias"

    def balance(self, reports: Mapping[str, RouterReport]) -> None:
        """Moves the bias by one step's loads over all ranks."""
        self.selection.move_bias(reports["mlp"])

    def _score(self, x_TD: Tensor, carry_TX: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits (T, 1, E) and what the next layer's router is handed."""
        if self.config.router == "recurrent":
            return self.router(x_TD, carry_TX)
        if self.config.router == "average_keys":
            averages_LD = self.experts.weights()["up"].mean(-1)
            averages_ED = self.dispatcher.gather(self.experts, averages_LD, label="mlp").wait()
            return average_key_logits(x_TD, averages_ED), carry_TX
        return self.router(x_TD), carry_TX

    def _regularise(self, logits_BS1E: Tensor, choice: Choice) -> _Losses:
        weights, spreads, load = self.config.loss_weights(), {}, ()
        logits_T1E = logits_BS1E.flatten(0, 1)
        if weights.entropy > 0 and self.config.entropy_over == "sequence":
            spreads["mlp"] = sequence_spread(logits_BS1E, self.statistics, weight=weights.entropy)
        elif weights.entropy > 0:
            spreads["mlp"] = batch_spread(logits_T1E, self.statistics, weight=weights.entropy)
        if weights.load > 0:
            reading = self.config.load_reading or "paper"
            load = (load_loss(logits_T1E, choice, self.statistics, weight=weights.load, reading=reading),)
        return _Losses(load, spreads)

    def _shared(self, x_BSD: Tensor, context: BatchContext) -> Tensor:
        """The experts that every token visits, as one dense layer."""
        hidden_BSF = self.shared_up(x_BSD).relu()
        if self.training:
            probability = self.config.hidden_dropout
            hidden_BSF = dropout(hidden_BSF, context, probability=probability, site="mlp_shared_hidden")
        return self.shared_down(hidden_BSF)

    def _experts(self, weights: Mapping[str, Tensor], rows_RD: Tensor, plan: LocalPlan) -> Tensor:
        """Partial results (P, D) of the experts that are here."""
        factors_CF, probability = None, self.config.hidden_dropout
        if plan.hashes_C is not None:
            factors_CF = hidden_factors(plan, channels=self.config.expert_dim, probability=probability)
        return gated_mlp(
            rows_RD,
            weights["up"],
            weights["down"],
            plan,
            backend=self.experts.backend,
            factors_CF=factors_CF,
            keep_hidden=self.config.keep_hidden,
        )

    def _routing(self, choice: Choice, context: BatchContext, length: int) -> Routing:
        """Reads the token and writes the token; brings its hash along where hidden activations are dropped."""
        num_tokens = choice.experts_THK.shape[0]
        tokens_N = torch.arange(num_tokens, device=choice.experts_THK.device)
        drops = self.training and self.config.hidden_dropout > 0
        return Routing(
            gates_NK=choice.gates_THK[:, 0],
            expert_ids_NK=choice.experts_THK[:, 0],
            source_row_N=tokens_N,
            output_row_N=tokens_N,
            num_rows=num_tokens,
            num_outputs=num_tokens,
            bank=self.experts,
            hashes_N=token_hashes(context, length, site="mlp_expert_hidden").flatten() if drops else None,
        )
