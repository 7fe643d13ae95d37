"""Product-key memory as a feed-forward: PKM (arXiv 1907.05242; as a feed-forward 2310.10837) and Memory+ (arXiv 2412.09764).

The layers are written for one process; parallel/parallelize.py narrows the table and hands it another dispatcher. Only ids and gates
travel to the owners of the values, and no hidden states. Shape letters: B rows, S positions, T = B*S tokens, D model width, H heads,
Z = 2 halves, J sub-keys of a half, C width of half a query, K picks, G = J^2 values, P output rows or queries.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from model.context import BatchContext
from model.dispatch import Dispatcher, LocalDispatcher, LocalPlan
from model.layer import LayerOutput, Linear
from model.lookup import table_reports, table_routing, table_rows, weighted_rows
from model.parameters import DeclaringModule, Initializer, Table, normal, uniform
from model.product_key_config import PKMConfig
from model.product_keys import ProductKeys, gates_of
from model.section import Place


class PKM(DeclaringModule):
    """y = sum over heads and their K best values e of gate_e * v_e; with `gated`, W2 (y * silu(W1 x)) of that.

    Gates are the softmax over a head's K scores, or the ReLU of each. Heads share the values; what two heads pick counts twice.
    """

    def __init__(self, config: PKMConfig, place: Place) -> None:
        super().__init__()
        self.config = config
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.router = _router(config, place)
        table: nn.Module = Table(config.num_keys**2, {"values": ((place.d_model,), normal(_value_std(config, place)))})
        if config.shared_values:
            table = place.shared.setdefault("pkm", table)
        assert isinstance(table, Table)
        self.table = table
        self.gate = MemoryGate(place.d_model) if config.gated else None

    def forward(self, x_BSD: Tensor, context: BatchContext, carry_TX: Tensor | None = None) -> LayerOutput:
        config = self.config
        x_TD = x_BSD.flatten(0, 1)

        # route
        queries_TPZC, updates = self.router(x_TD)
        assert config.top_k is not None
        choice = self.router.choose(queries_TPZC, top_k=config.top_k)
        gates_THK = gates_of(choice.scores_THK, kind=config.scores)
        rows_THK = table_rows(choice.first_THK, choice.second_THK, num_keys=config.num_keys)
        (exchange,) = self.dispatcher.plan(table_routing(rows_THK, gates_THK, self.table))

        # dispatch rows of width 0; look up at the owner, combine
        arriving = self.dispatcher.dispatch(exchange, x_TD.new_empty(len(x_TD), 0), label="pkm")
        gathering = self.dispatcher.weights(exchange, label="pkm")
        reports = table_reports(choice, gates_THK, rows_THK, self.table, num_keys=config.num_keys)
        weights = gathering.wait()

        def values(rows_R0: Tensor, plan: LocalPlan) -> Tensor:
            return weighted_rows(weights["values"], plan, backend=self.table.backend)

        y_BSD = self.dispatcher.combine(arriving, values, label="pkm").wait().view_as(x_BSD)
        if self.gate is not None:
            y_BSD = self.gate(y_BSD, x_BSD)
        return LayerOutput(y_BSD, reports=reports, updates=updates)


class DensePKM(DeclaringModule):
    """All values: y = sum over e of gate_e * v_e, with gates the softmax or ReLU of the scores summed over the heads.

    The published form of arXiv 2310.10837, whose num_keys is at most its knn. Nothing is looked up, so every rank has all values, as
    of a dense MLP with J^2 hidden units. Value a J + b is that of the pair (a, b).
    """

    values: Tensor

    def __init__(self, config: PKMConfig, place: Place) -> None:
        super().__init__()
        self.config = config
        self.router = _router(config, place)
        draw = normal(_value_std(config, place))
        self.declare("values", (config.num_keys**2, place.d_model), draw, decays=False)
        self.gate = MemoryGate(place.d_model) if config.gated else None

    def forward(self, x_BSD: Tensor, context: BatchContext, carry_TX: Tensor | None = None) -> LayerOutput:
        queries_TPZC, updates = self.router(x_BSD.flatten(0, 1))
        first_TJ, second_TJ = self.router.scores(queries_TPZC).sum(1).unbind(1)
        scores_TG = (first_TJ[:, :, None] + second_TJ[:, None, :]).flatten(1)
        y_BSD = (gates_of(scores_TG, kind=self.config.scores) @ self.values).view(x_BSD.shape)
        if self.gate is not None:
            y_BSD = self.gate(y_BSD, x_BSD)
        return LayerOutput(y_BSD, updates=updates)


class MemoryGate(DeclaringModule):
    """Memory+: W2 (y * silu(W1 x)), W1 and W2 D x D with biases (arXiv 2412.09764)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        draw = normal(1 / math.sqrt(d_model))
        self.opening = Linear(d_model, d_model, draw=draw, bias=True)
        self.output = Linear(d_model, d_model, draw=draw, bias=True)

    def forward(self, y_BSD: Tensor, x_BSD: Tensor) -> Tensor:
        return self.output(y_BSD * F.silu(self.opening(x_BSD)))


def _router(config: PKMConfig, place: Place) -> ProductKeys:
    return ProductKeys(
        d_model=place.d_model,
        num_heads=config.num_heads,
        num_keys=config.num_keys,
        key_dim=config.key_dim,
        shared_keys=config.shared_keys,
        norm=config.query_norm,
        # a batch norm's mean takes a bias out again, and AdamW would follow the rounding of its gradient
        bias=config.query_norm != "batch",
        draw_keys=_draw_keys(config, place),
    )


def _draw_keys(config: PKMConfig, place: Place) -> Initializer:
    """arXiv 2310.10837: normal of std sqrt(2 / L / query width). 1907.05242, 2412.09764: uniform, by half the width and by the width."""
    width = config.key_dim or place.d_model
    if config.initialisation == "lample":
        return uniform(1 / math.sqrt(width // 2))
    if config.initialisation == "memory_layers":
        return uniform(1 / math.sqrt(width))
    return normal(math.sqrt(2 / place.num_layers / width))


def _value_std(config: PKMConfig, place: Place) -> float:
    """dense_equivalent takes the number of values for the fan-in, as the second matrix of a dense MLP with so many hidden units."""
    if config.initialisation == "standard":
        return math.sqrt(2 / place.num_layers / place.d_model)
    if config.initialisation == "dense_equivalent":
        return math.sqrt(2 / place.num_layers) / config.num_keys
    return 1 / math.sqrt(place.d_model)
