"""What hierarchical shift mixing costs, in our counting (model/cost.py); the paper's is not known. Called by HSMConfig.

Letters: D model width, H heads or slices, F hidden width of fusion. Imports no torch.
"""

from model.cost import Cost, Work
from model.hsm.config import HSMConfig
from model.section import Place


def hsm_cost(config: HSMConfig, place: Place, *, length: int) -> Cost:
    """By the table of docs/hsm.md. A gate or a factor times a vector is one multiply-accumulate per channel."""
    D, H, F = place.d_model, config.num_heads or 1, config.hidden_dim or 0
    weights, biases, macs, floats = {  # per token; floats: with the shifted token, which factors alone do not need
        "constant": (2, 0, 2 * D, 0),
        "vector": (2 * D, 0, 2 * D, 0),
        "multihead": (2 * H, 0, 2 * D, 0),
        "matrix_scalar": (D * D + 1, D, D * D + D, 2 * D),
        "matrix": (2 * D * D, D, 2 * D * D, 3 * D),
        "multihead_matrix": (2 * D * D // H, D, 2 * D * D // H, 3 * D),
        "single_gate": (2 * D * D, D, 2 * D * D + 2 * D, 2 * D),
        "double_gate": (4 * D * D, 2 * D, 4 * D * D + 2 * D, 3 * D),
        "fusion": (3 * D * F, F + D, 3 * D * F, D + F),
    }[config.variant]
    shifts = config.shifts(place.mixers, depth=place.depth)
    return Cost(
        weights + (0 if config.bias is False else biases),
        Work(macs * length, floats * length),
        decode_floats=sum(shifts) * D // len(shifts),
    )
