"""What product-key layers cost, in our counting (model/cost.py); the SwitchHead papers have none for them.

Called by the sections of model/product_key_config.py. Letters: D model width, H heads, J sub-keys of a half, K picks per head, Q width of
a head's query. Imports no torch.
"""

from model.cost import Cost, Work
from model.product_key_config import PEERConfig, PKMConfig


def peer_cost(config: PEERConfig, *, d_model: int, length: int) -> Cost:
    """Query and sub-keys of all heads, H K experts with their gates, on a row of `length` tokens (specs of arXiv 2407.04153, 1.6)."""
    keys = _keys_cost(config, d_model=d_model, length=length, bias=False)
    picks = config.num_heads * config.top_k
    macs = keys.work.macs + picks * (2 * d_model + 1) * length
    return Cost(keys.active_parameters + picks * 2 * d_model, Work(macs, keys.work.floats + picks * length))


def pkm_cost(config: PKMConfig, *, d_model: int, length: int) -> Cost:
    """Query and sub-keys of all heads, the values that are read, Memory+'s gate, on a row of `length` tokens."""
    D = d_model
    keys = _keys_cost(config, d_model=d_model, length=length, bias=config.query_norm != "batch")
    values = config.num_keys**2 if config.top_k is None else config.num_heads * config.top_k
    weights, macs, floats = values * D, values * D, 0
    if config.top_k is None:
        floats += values * (2 if config.scores == "softmax" else 1)  # scores, and what the softmax makes of them
    if config.gated:
        weights, macs, floats = weights + 2 * (D * D + D), macs + 2 * D * D, floats + 2 * D
    work = Work(keys.work.macs + macs * length, keys.work.floats + floats * length)
    return Cost(keys.active_parameters + weights, work)


def _keys_cost(config: PEERConfig | PKMConfig, *, d_model: int, length: int, bias: bool) -> Cost:
    """The query's projection and norm, and the scores of 2 J sub-keys per head; of a pick stay its score and two sub-keys."""
    H, J, Q = config.num_heads, config.num_keys, config.key_dim or d_model
    width = Q if config.key_dim is None else H * Q
    kept = 2 * J if config.top_k is None else 3 * config.top_k
    weights, macs, floats = (1 if config.shared_keys else H) * J * Q, H * J * Q, H * kept
    if config.key_dim is not None:
        weights, macs, floats = weights + width * (d_model + bias), macs + width * d_model, floats + width
    weights += {"batch": 2 * width, "layer": 2 * Q, "none": 0}[config.query_norm]
    return Cost(weights, Work(macs * length, floats * length))
