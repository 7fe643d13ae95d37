"""PEER feed-forward: very many experts of one neuron each, looked up by product keys (He, arXiv 2407.04153).

The layer is written for one process; parallel/parallelize.py narrows the table and hands it another dispatcher, and the query's norm
statistics over all ranks. Shape letters: B rows, S positions, T = B*S tokens, D model width, H heads, Z = 2 halves, J sub-keys of a
half, C width of half a query, K picks, N = T routings, R received rows, P output rows or queries, X columns of the tables held here.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from model.context import BatchContext
from model.dispatch import Dispatcher, LocalDispatcher, LocalPlan
from model.layer import LayerOutput
from model.lookup import neurons, partial_products, table_reports, table_routing, table_rows, weighted_rows
from model.parameters import DeclaringModule, Table, normal
from model.product_key_config import PEERConfig
from model.product_keys import ProductKeys, gates_of
from model.section import Place

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu}
MEAN_SQUARE = {"gelu": 0.425, "relu": 0.5}  # E[activation(z)^2] of z ~ N(0, 1)


class PEER(DeclaringModule):
    """y = sum over heads and their K best experts e of gate_e * activation(u_e . x) * v_e; no biases, no output projection.

    Gates are the softmax over a head's K scores, or the sigmoid or ReLU of each. Heads share the experts; what two heads pick for one
    token counts twice. There is no balancing loss.
    """

    def __init__(self, config: PEERConfig, place: Place) -> None:
        super().__init__()
        self.config = config
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.router = ProductKeys(
            d_model=place.d_model,
            num_heads=config.num_heads,
            num_keys=config.num_keys,
            key_dim=config.key_dim,
            shared_keys=config.shared_keys,
            norm=config.query_norm,
        )
        width = (place.d_model,)
        up, down = normal(1 / math.sqrt(place.d_model)), normal(_down_std(config, place))
        pool: nn.Module = Table(config.num_experts, {"up": (width, up), "down": (width, down)})
        if config.shared_experts:
            pool = place.shared.setdefault("peer", pool)
        assert isinstance(pool, Table)
        self.experts = pool

    def forward(self, x_BSD: Tensor, context: BatchContext, carry_TX: Tensor | None = None) -> LayerOutput:
        config = self.config
        x_TD = x_BSD.flatten(0, 1)

        # route
        queries_TPZC, updates = self.router(x_TD)
        choice = self.router.choose(queries_TPZC, top_k=config.top_k)
        gates_THK = gates_of(choice.scores_THK, kind=config.scores)
        rows_THK = table_rows(choice.first_THK, choice.second_THK, num_keys=config.num_keys)
        by_columns = self.experts.columns > 1
        routing = table_routing(rows_THK, None if by_columns else gates_THK, self.experts)
        (exchange,) = self.dispatcher.plan(routing)

        # dispatch; both products at the owner, combine
        arriving = self.dispatcher.dispatch(exchange, x_TD, label="peer")
        gathering = self.dispatcher.weights(exchange, label="peer")
        reports = table_reports(choice, gates_THK, rows_THK, self.experts, num_keys=config.num_keys)
        weights = gathering.wait()
        if by_columns:
            y_TD = self._by_columns(arriving, weights, gates_THK.flatten(1))
        else:

            def experts(rows_RD: Tensor, plan: LocalPlan) -> Tensor:
                tables = weights["up"], weights["down"]
                return neurons(rows_RD, *tables, plan, activation=config.activation, backend=self.experts.backend)

            y_TD = self.dispatcher.combine(arriving, experts, label="peer").wait()
        return LayerOutput(y_TD.view_as(x_BSD), reports=reports, updates=updates)

    def _by_columns(self, arriving: Any, weights: Mapping[str, Tensor], gates_NK: Tensor) -> Tensor:
        """Each rank has some columns of its experts, and the activation needs the sum over all: a number per copy comes home and its
        gated activation goes out again before the second product (specs of arXiv 2407.04153, section 3.2, D). Gives (T, D).
        """

        def products(rows_RX: Tensor, plan: LocalPlan) -> Tensor:
            return partial_products(rows_RX, weights["up"], plan, backend=self.experts.backend)

        def values(rows_RX: Tensor, plan: LocalPlan) -> Tensor:
            return weighted_rows(weights["down"], plan, backend=self.experts.backend)

        z_NK = self.dispatcher.reply(arriving, products, label="peer").wait()
        weights_NK = gates_NK * ACTIVATIONS[self.config.activation](z_NK)
        return self.dispatcher.combine(arriving, values, label="peer", gates_NK=weights_NK).wait()


def _down_std(config: PEERConfig, place: Place) -> float:
    """So that y begins with variance 1 / (2 num_layers) where x has variance 1 (specs of arXiv 2407.04153, section 5; our choice).

    The mean of the sum of a head's squared gates: softmax, nearly uniform over the best, 1 / K; sigmoid of the best scores, about K;
    ReLU, K times the square of a sum of two largest of J scores of variance 1/3, about (8/3) ln J.
    """
    squared_gates = {
        "softmax": 1 / config.top_k,
        "sigmoid": config.top_k,
        "relu": config.top_k * 8 / 3 * math.log(max(2, config.num_keys)),
    }[config.scores]
    return math.sqrt(1 / (2 * place.num_layers * MEAN_SQUARE[config.activation] * config.num_heads * squared_gates))
