"""The calls of product_key_topk whose compiled code is watched: every tile of the forward pass at PEER's sizes, its first tile with odd
sizes and with the most picks, and the two launches of the backward pass.

Owns: that choice. Does not own: compiling and measuring (kernels/tools.py). Called by: benchmarks/kernels/compile_table.py.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kernels.product_key_topk.kernel import TILES, launch_choose, launch_of_keys, launch_of_queries
from kernels.sum_copies import RowCopies
from kernels.tools import Form

T = 4096


@dataclass(frozen=True)
class Sizes:
    """H heads with K picks among J + J sub-keys of width C. shared: sub-keys of all heads."""

    heads: int
    picks: int
    num_keys: int
    width: int
    shared: bool = True

    def queries(self) -> Tensor:
        return torch.empty(T, self.heads, 2, self.width)

    def keys(self) -> Tensor:
        return torch.empty(1 if self.shared else self.heads, 2, self.num_keys, self.width)


def launch_forward(sizes: Sizes, *, tiles: int = 0) -> None:
    """tiles: which of those that are tried."""
    launch_choose(sizes.queries(), sizes.keys(), top_k=sizes.picks, tiles=TILES[tiles])


def launch_backward(sizes: Sizes) -> None:
    gradient_THK = torch.empty(T, sizes.heads, sizes.picks)
    ids_THK = torch.empty(gradient_THK.shape, dtype=torch.int64)
    keys_HZJC = sizes.keys()
    launch_of_queries(gradient_THK, keys_HZJC, ids_THK, ids_THK)
    copies = RowCopies(
        torch.empty(2 * gradient_THK.numel(), dtype=torch.int32),
        torch.empty(keys_HZJC.shape[:3].numel(), dtype=torch.int32),
    )
    launch_of_keys(gradient_THK, sizes.queries(), copies, shape=tuple(keys_HZJC.shape))


PEER = "H 8, K 16 of 1024^2, C 64"
NAMED = {
    PEER: Sizes(8, 16, 1024, 64),
    "H 4, K 8 of 155^2, C 206, own keys": Sizes(4, 8, 155, 206, shared=False),
    "H 1, K 64 of 1024^2, C 64": Sizes(1, 64, 1024, 64),
}

FORMS = [
    *(Form(f"forward, {name}", partial(launch_forward, sizes)) for name, sizes in NAMED.items()),
    *(Form(f"forward, {PEER}, tiles {tiles}", partial(launch_forward, NAMED[PEER], tiles=tiles)) for tiles in (1, 2)),
    *(
        Form(f"backward, {name}", partial(launch_backward, NAMED[name]), can_spill=True)
        for name in (PEER, "H 4, K 8 of 155^2, C 206, own keys")
    ),
]
