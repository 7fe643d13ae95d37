"""What one layer costs, in two countings: ours, and the one that the papers' tables are made with.

Owns the words and the rules. The formulas of a kind lie beside its settings (`cost` of its section: model/attention_cost.py,
model/feedforward_config.py, model/hsm/config.py ...); model/table.py adds the layers up. Imports no torch. Counts are of one layer,
used once, forward only, on one row of S tokens; over S they are per token.

Ours. Multiply-accumulates: every product of matrices, and the gates on the narrow side of an expert's product. Keys, values and their
experts and routers are computed on memory too; routers count every head; relative positions count the projection of all S (1 + C)
distances (once for a row, though the rows of a micro-step share it) and their scores. Attention counts all pairs of query and key, also those
that the causal mask hides: a kernel that skips them saves half of the row's own pairs. Norms, softmax, activations, rotations and sums are not counted. Floats: the result of every projection,
router and product inside the layer and of the softmax, once each; not the layer's output, and not the K copies of a routed row. A
fused attention writes neither scores nor probabilities, which this counting does not see.

The papers'. The formulas of the SwitchHead and MoEUT papers' code (arXiv 2312.07987, 2405.16039), for the kinds that they have. Against ours
they leave out the keys' and values' work on memory, the heads of the routers, the scores of distances, and, for SwitchHead alone,
the memory's part of the positions. They count twice the distances (2 S, of which a causal model needs half).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Multiply-accumulates of a forward pass of one layer on one row, and the numbers that it writes."""

    macs: int
    floats: int


@dataclass(frozen=True)
class Cost:
    """What one layer costs, used once.

    active_parameters: weights that take part in one token's output, norms not included. decode_floats: numbers kept per sequence while it is
    decoded, once it is as long as what a row sees in training, S (1 + memory_blocks). papers: the work by the papers' formulas,
    None where they have none or count as we do.
    """

    active_parameters: int
    work: Work
    decode_floats: int = 0
    papers: Work | None = None

    @property
    def papers_work(self) -> Work:
        """By the papers' counting where there is one, else by ours."""
        return self.papers or self.work
