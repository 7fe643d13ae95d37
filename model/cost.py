"""What one layer costs, in two countings: ours, and the one that the papers' tables are made with.

Owns the words and the rules. The formulas of a kind are its section's `cost`: attention_cost.py, feedforward_cost.py,
product_key_cost.py, hsm/cost.py; cost_table.py adds the layers up. Imports no torch. Counts are of one layer, used once, forward only,
on one row of S tokens; over S they are per token.

Ours. Multiply-accumulates: every product of matrices, and the gates on the narrow side of an expert's product. Keys, values, their
experts and their routers are computed on memory too, and a router has all its heads. Relative positions: the projection of all
S (1 + C) distances (once for a row, though the rows of a micro-step share it) and the scores of the distances. Attention: all pairs
of query and key, also those that the causal mask hides; a kernel that skips them saves half of the row's own pairs. Not counted:
norms, softmax, activations, rotations, sums. Floats: the results of these products and of the softmax, once each; not the layer's
output, and not the K copies of a routed row. A fused attention writes neither scores nor probabilities: this counting does not see it.
Where only our own kernels compute, what they keep for the backward pass counts instead of what they drop at once: of sub-keys the picks (a
score and two ids), of top-k attention the kept keys (a probability and an id; in Triton three numbers for a query), of shifting by factors
nothing.

The papers'. The formulas in the code of arXiv 2312.07987 and 2405.16039, for the kinds that these have. Against ours they leave out the
work of keys, values and their experts on memory, the heads of the routers and the scores of the distances. They count 2 S (1 + C)
distances, both signs, but for SwitchHead only 2 S.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Multiply-accumulates of a forward pass of one layer on one row, and its floats: results, or what our kernels keep of them."""

    macs: int
    floats: int


@dataclass(frozen=True)
class Cost:
    """What one layer costs, used once.

    active_parameters: weights that work on one token. decode_floats: numbers kept per sequence while it is decoded, once it is as
    long as what a row sees in training, S (1 + memory_blocks). papers: the work by the papers' formulas, None where they have none
    or count as we do.
    """

    active_parameters: int
    work: Work
    decode_floats: int = 0
    papers: Work | None = None

    @property
    def papers_work(self) -> Work:
        """By the papers' counting where there is one, else by ours."""
        return self.papers or self.work
