"""What softmax attention and SwitchHead cost: their formulas in the two countings of model/cost.py.

Called by the sections of model/attention_config.py. Letters: S tokens of a row, M keys of memory and row, D model width, H heads, G
heads of K and V, C head width, E experts, K choices. Imports no torch.
"""

from model.attention_config import SOURCE_SIDE, AttendSection, AttentionConfig, SwitchHeadConfig
from model.cost import Cost, Work


def attention_cost(config: AttentionConfig, *, d_model: int, length: int) -> Cost:
    """Dense attention on a row of `length` tokens."""
    D, H, G, C = d_model, config.num_heads, config.kv_heads(), config.head_dim
    keys, pairs = _num_keys(config, length), _attend(config, d_model=d_model, length=length)
    weights = 2 * D * H * C + 2 * D * G * C
    if config.positions == "xl":
        weights += D * H * C + 2 * H * C + 1
    macs = 2 * D * H * C * length + 2 * D * G * C * keys + pairs.macs
    floats = H * C * length + 2 * G * C * keys + pairs.floats
    published = G == H and config.attend_top_k is None
    return Cost(
        weights,
        Work(macs, floats),
        decode_floats=2 * G * C * keys,
        papers=_papers_attention(config, d_model=d_model, length=length) if published else None,
    )


def switchhead_cost(config: SwitchHeadConfig, *, d_model: int, length: int) -> Cost:
    """SwitchHead with any of its projections as experts, on a row of `length` tokens."""
    D, H, C, E, K = d_model, config.num_heads, config.head_dim, config.num_experts, config.top_k
    keys, pairs = _num_keys(config, length), _attend(config, d_model=d_model, length=length)
    router_of, weights, macs, floats = config.router_of(), 0, pairs.macs, pairs.floats
    for name in ("query", "key", "value", "output"):
        positions = keys if name in SOURCE_SIDE else length
        copies = K if name in router_of else 1
        weights += copies * D * H * C
        macs += copies * D * H * C * positions
        if name in router_of:
            macs += K * H * C * positions  # the gates
        if name != "output":  # what the layer gives is not written for itself
            floats += H * C * positions
    for router in dict.fromkeys(router_of.values()):
        reads_memory = any(name in SOURCE_SIDE for name, its_router in router_of.items() if its_router == router)
        positions = keys if reads_memory else length
        weights += H * E * D
        macs += H * E * D * positions
        floats += H * E * positions
    if config.positions == "xl":
        weights += D * H * C
    published = config.attend_top_k is None
    return Cost(
        weights,
        Work(macs, floats),
        decode_floats=2 * H * C * keys,
        papers=_papers_switchhead(config, d_model=d_model, length=length) if published else None,
    )


def gated_attention_cost(config: SwitchHeadConfig, *, d_model: int, length: int) -> Cost:
    """SwitchHead with a single expert as `single_expert: gate_output`: dense projections, one gate per token and head."""
    D, H, C = d_model, config.num_heads, config.head_dim
    keys, pairs = _num_keys(config, length), _attend(config, d_model=d_model, length=length)
    weights = 4 * D * H * C + H * D + (D * H * C if config.positions == "xl" else 0)
    macs = 2 * D * H * C * (length + keys) + H * D * length + H * C * length + pairs.macs
    floats = H * C * (length + 2 * keys) + H * length + pairs.floats
    return Cost(weights, Work(macs, floats), decode_floats=2 * H * C * keys)


def _num_keys(config: AttendSection, length: int) -> int:
    return length * (1 + config.memory_blocks)


def _attend(config: AttendSection, *, d_model: int, length: int) -> Work:
    """Scores of all pairs, the softmax over the kept ones and what they read; for xl the distances of all keys and their scores.

    With top_k no score stays, but of each kept key its probability and which it is.
    """
    H, C, keys = config.num_heads, config.head_dim, _num_keys(config, length)
    read, scores = (keys, keys) if config.attend_top_k is None else (config.attend_top_k, 0)
    macs = H * C * length * (keys + read)
    floats = H * length * (scores + read if scores else 2 * read) + H * C * length
    if config.positions == "xl":
        macs += d_model * H * C * keys + H * C * length * keys
        floats += H * C * keys + H * length * scores
    return Work(macs, floats)


def _papers_attention(config: AttentionConfig, *, d_model: int, length: int) -> Work:
    width, keys = config.num_heads * config.head_dim, _num_keys(config, length)
    distances = 2 * keys if config.positions == "xl" else 0
    macs = 2 * width * length * keys + width * d_model * (4 * length + distances)
    floats = 2 * config.num_heads * length * keys + width * (4 * length + distances)
    return Work(macs, floats)


def _papers_switchhead(config: SwitchHeadConfig, *, d_model: int, length: int) -> Work:
    width, keys, experts = config.num_heads * config.head_dim, _num_keys(config, length), len(config.experts)
    distances = 2 * length if config.positions == "xl" else 0  # the dense baseline's have memory too
    projections = experts * config.top_k + 4 - experts
    macs = 2 * width * length * keys + width * d_model * (projections * length + distances)
    macs += experts * width * config.top_k * length + 2 * config.num_experts * d_model * keys
    floats = 2 * config.num_heads * length * keys + width * (4 * length + distances) + 2 * config.num_experts * keys
    return Work(macs, floats)
