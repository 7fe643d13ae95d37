"""What the feed-forwards cost: their formulas in the two countings of model/cost.py.

Called by the sections of model/feedforward_config.py. Letters: D model width, F width of the hidden layer or of an expert, E experts, K
choices, X width of a recurrent router.
"""

from model.cost import Cost, Work
from model.feedforward_config import DenseMLPConfig, SigmaMoEConfig
from model.recurrent_router import ROUTER_DIM


def dense_mlp_cost(config: DenseMLPConfig, *, d_model: int, length: int) -> Cost:
    """The whole layer, on a row of `length` tokens. With top_k, W2 works with K rows, but zeros are multiplied like the rest."""
    D, F = d_model, config.hidden_dim
    ups = 2 if config.activation == "swiglu" else 1
    kept = F if config.top_k is None else config.top_k
    weights = ups * D * F + kept * D + (ups * F + D if config.has_bias() else 0)
    return Cost(weights, Work((ups + 1) * D * F * length, ups * F * length))


def sigma_moe_cost(config: SigmaMoEConfig, *, d_model: int, length: int) -> Cost:
    """The router over all experts, K experts and their gates, the shared experts, on a row of `length` tokens.

    average_keys: the averages are made once for all tokens and count neither as work nor as active weights. noisy: as in training.
    """
    D, F, E, K = d_model, config.expert_dim, config.num_experts, config.top_k
    router, router_macs, router_floats = E * D, E * D, E
    if config.router == "average_keys":
        router = 0
    elif config.router == "noisy":
        router, router_macs, router_floats = 2 * E * D, 2 * E * D, 2 * E
    elif config.router == "recurrent":
        X = config.router_dim or ROUTER_DIM
        router_macs, router_floats = X * D + 6 * X * X + E * X, X + 6 * X + E
        router = router_macs + 6 * X
    shared = 2 * D * F * config.num_shared_experts
    published = router_macs == E * D and not shared
    return Cost(
        router + K * 2 * D * F + shared,
        Work(
            (router_macs + K * 2 * D * F + K * F + shared) * length,
            (router_floats + (K + config.num_shared_experts) * F) * length,
        ),
        papers=Work((E * D + K * 2 * D * F) * length, (E + K * F) * length) if published else None,
    )
