"""Routes of a benchmark's tokens: which experts each chooses, and the copies sorted by expert.

Called by: benchmarks/kernels/bench_expert_mlp.py, bench_grouped_matmul.py and bench_switchhead_project.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SortedCopies:
    """Copies sorted by group (head * E + expert). P pairs of a token and a head, K copies of each; pair_C: of each copy."""

    ids_PK: Tensor
    order_C: Tensor
    pair_C: Tensor
    offsets_G: Tensor


def choose_experts(*, tokens: int, num_experts: int, top_k: int, zipf: bool, generator: torch.Generator) -> Tensor:
    """Distinct experts of each token (T, K). Zipf 1.0: expert i is drawn in proportion to 1 / (i + 1); else all alike."""
    chances_E = torch.arange(1, num_experts + 1, device=generator.device).float() ** (-1.0 if zipf else 0.0)
    return torch.multinomial(chances_E.expand(tokens, -1), top_k, generator=generator)


def sorted_copies(
    *, tokens: int, heads: int = 1, num_experts: int, top_k: int, zipf: bool, generator: torch.Generator
) -> SortedCopies:
    """Each head chooses among experts of its own."""
    ids_PK = choose_experts(tokens=tokens * heads, num_experts=num_experts, top_k=top_k, zipf=zipf, generator=generator)
    head_P1 = (torch.arange(tokens * heads, device=generator.device) % heads)[:, None]
    sorted_C, order_C = (head_P1 * num_experts + ids_PK).flatten().sort(stable=True)
    groups_G = torch.arange(heads * num_experts, device=generator.device)
    offsets_G = torch.searchsorted(sorted_C, groups_G, right=True).int()
    return SortedCopies(ids_PK, order_C, order_C // top_k, offsets_G)
