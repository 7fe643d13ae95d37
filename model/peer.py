"""PEER feed-forward: very many experts of one neuron each, looked up by product keys (He, arXiv 2407.04153).

The layer is written for one process; parallel/parallelize.py narrows the table and hands it another dispatcher, and the query's norm
statistics over all ranks. Shape letters: B rows, S positions, T = B*S tokens, D model width, H heads, Z = 2 halves, J sub-keys of a
half, K picks, R received rows, P output rows.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from model.context import BatchContext
from model.dispatch import Dispatcher, LocalDispatcher
from model.layer import LayerOutput
from model.lookup import neurons, table_reports, table_routing, table_rows
from model.parameters import DeclaringModule, Table, normal
from model.product_key_config import PEERConfig
from model.product_keys import ProductKeys, choose_pairs, gates_of
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
        scores_THZJ, updates = self.router(x_TD)
        choice = choose_pairs(scores_THZJ, top_k=config.top_k)
        gates_THK = gates_of(choice.scores_THK, kind=config.scores)
        rows_THK = table_rows(choice.first_THK, choice.second_THK, num_keys=config.num_keys)
        (exchange,) = self.dispatcher.plan(table_routing(rows_THK, gates_THK, self.experts))

        # dispatch, both products at the owner, combine
        arriving = self.dispatcher.dispatch(exchange, x_TD, label="peer")
        gathering = self.dispatcher.weights(exchange)
        reports = table_reports(choice, gates_THK, rows_THK, self.experts, num_keys=config.num_keys)
        (rows_RD, plan), weights = arriving.wait(), gathering.wait()
        activation = ACTIVATIONS[config.activation]
        partials_PD = neurons(rows_RD, weights["up"], weights["down"], plan, activation=activation)
        y_TD = self.dispatcher.combine(exchange, partials_PD, label="peer").wait()
        return LayerOutput(y_TD.view_as(x_BSD), reports=reports, updates=updates)


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
