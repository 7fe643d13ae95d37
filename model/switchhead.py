"""SwitchHead attention: value and output projections are experts, chosen per token and head (arXiv 2312.07987).

q and k stay dense; there is one attention matrix per head. The layer is written for one process; parallel/parallelize.py narrows the
two banks and hands it another dispatcher. Shape letters: B rows, S positions, T = B*S tokens, D model width, H heads, C head width,
E experts per head, K choices, G = H*E expert groups (group h*E + e), R received rows, P output rows.
"""

import math

import torch
from torch import Tensor

from model.attention import attend, split_heads
from model.config import SwitchHeadConfig
from model.context import BatchContext
from model.dispatch import Dispatcher, LocalDispatcher, Routing
from model.experts import gate_then_project, project_then_gate
from model.layer import LayerOutput, Linear
from model.parameters import DeclaringModule, ExpertBank, normal
from model.rope import rotate
from model.router import Choice, Router, choose, kept_experts, report, switchhead_rows


class SwitchHead(DeclaringModule):
    """RoPE form, pre-normalised input, no biases, sigmoid gates without renormalisation, separate routers for V and O.

    `depth` names the layer in dropout keys; `num_layers` sets the initial scale sqrt(2 / L) of the paper's training code.
    """

    def __init__(self, config: SwitchHeadConfig, *, d_model: int, num_layers: int, depth: int, backend: str) -> None:
        super().__init__()
        self.config = config
        self.depth = depth
        self.backend = backend
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.num_groups = config.num_heads * config.num_experts
        inner_dim = config.num_heads * config.head_dim
        std_in = math.sqrt(2 / num_layers / d_model)
        std_out = math.sqrt(2 / num_layers / inner_dim)  # the fan-in of the whole projection, never of one expert
        routing = {"d_model": d_model, "num_heads": config.num_heads, "num_experts": config.num_experts}
        self.query = Linear(d_model, inner_dim, draw=normal(std_in))
        self.key = Linear(d_model, inner_dim, draw=normal(std_in))
        self.value_router = Router(**routing, draw=switchhead_rows(std_in))
        self.output_router = Router(**routing, draw=switchhead_rows(std_in))
        self.value_experts = ExpertBank(self.num_groups, {"weight": ((d_model, config.head_dim), normal(std_in))})
        self.output_experts = ExpertBank(self.num_groups, {"weight": ((config.head_dim, d_model), normal(std_out))})

    def forward(self, x_BSD: Tensor, context: BatchContext) -> LayerOutput:
        """y (B, S, D): sum over heads and chosen O experts of gate * (attention over the chosen V experts' values)."""
        batch, length, d_model = x_BSD.shape
        x_TD = x_BSD.reshape(-1, d_model)
        heads = self.config.num_heads

        # route: both routers read the layer's input, so one exchange of counts serves V and O
        value_logits_THE, output_logits_THE = self.value_router(x_TD), self.output_router(x_TD)
        values = self._choose(value_logits_THE, context, site="value_expert")
        outputs = self._choose(output_logits_THE, context, site="output_expert")
        exchange_v, exchange_o = self.dispatcher.plan(
            self._routing(values, to_heads=True), self._routing(outputs, to_heads=False)
        )

        # V: dispatch under Q, K and RoPE, grouped_matmul, combine
        arriving = self.dispatcher.dispatch(exchange_v, x_TD, label="value")
        value_weights = self.dispatcher.weights(self.value_experts)
        q_BHSC = rotate(split_heads(self.query(x_BSD), heads))
        k_BHSC = rotate(split_heads(self.key(x_BSD), heads))
        rows_RD, plan = arriving.wait()
        partials_PC = project_then_gate(rows_RD, value_weights.wait()["weight"], plan, backend=self.backend)
        v_XC = self.dispatcher.combine(exchange_v, partials_PC, label="value").wait()
        mixed_BHSC = attend(
            q_BHSC, k_BHSC, split_heads(v_XC.view(batch, length, heads * self.config.head_dim), heads), context
        )

        # O: dispatch, grouped_matmul, combine
        mixed_XC = mixed_BHSC.transpose(1, 2).reshape(-1, self.config.head_dim)
        arriving = self.dispatcher.dispatch(exchange_o, mixed_XC, label="output")
        output_weights = self.dispatcher.weights(self.output_experts)
        rows_RC, plan = arriving.wait()
        partials_PD = gate_then_project(rows_RC, output_weights.wait()["weight"], plan, backend=self.backend)
        y_TD = self.dispatcher.combine(exchange_o, partials_PD, label="output").wait()

        reports = {"value": report(value_logits_THE, values), "output": report(output_logits_THE, outputs)}
        return LayerOutput(y_TD.view(batch, length, d_model), (), reports)

    def _choose(self, logits_THE: Tensor, context: BatchContext, *, site: str) -> Choice:
        probability = self.config.expert_dropout if self.training else 0.0
        kept_THE = kept_experts(logits_THE, context, probability=probability, site=site, depth=self.depth)
        return choose(logits_THE, top_k=self.config.top_k, kept_THE=kept_THE)

    def _routing(self, choice: Choice, *, to_heads: bool) -> Routing:
        """V (to_heads) reads the token and writes (token, head); O reads (token, head) and writes the token."""
        num_tokens, num_heads, num_choices = choice.experts_THK.shape
        device = choice.experts_THK.device
        pair_X = torch.arange(num_tokens * num_heads, device=device)
        token_X = pair_X // num_heads
        first_group_H1 = torch.arange(num_heads, device=device)[:, None] * self.config.num_experts
        return Routing(
            gates_NK=choice.gates_THK.reshape(-1, num_choices),
            expert_ids_NK=(choice.experts_THK + first_group_H1).view(-1, num_choices),
            source_row_N=token_X if to_heads else pair_X,
            output_row_N=pair_X if to_heads else token_X,
            num_rows=num_tokens if to_heads else num_tokens * num_heads,
            num_outputs=num_tokens * num_heads if to_heads else num_tokens,
            num_groups=self.num_groups,
        )
