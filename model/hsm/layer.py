"""Hierarchical shift mixing as a mixer: each token meets one earlier token per layer, and all of them over the depth.

Puts the shift (shift.py) and the mixing function (mixing.py) together, or hands both to kernels/shift_mix where tokens are only scaled;
the distances come from the schedule. Work and memory are linear in the row's length: no object over pairs of positions is ever made.
Shape letters: B rows, S positions, D model width, X channels of one shift or slices of one factor.
"""

import torch
from torch import Tensor

from kernels.shift_mix import shift_mix
from model.context import BatchContext
from model.hsm.config import Boundary, HSMConfig
from model.hsm.mixing import LinearMix, mixing
from model.hsm.shift import Ring, shift
from model.layer import LayerOutput
from model.parameters import DeclaringModule
from model.section import Place


class HSMCache:
    """Decode state of one layer: per shift s a ring of the last s inputs of the layer. It does not grow with the tokens seen."""

    def __init__(self, shifts: tuple[int, ...]) -> None:
        self.rings = [Ring(amount) for amount in shifts]

    @property
    def length(self) -> int:
        """Positions seen so far."""
        return self.rings[0].length

    @property
    def num_floats(self) -> int:
        """Floats per row held now: s * D, or with own shifts of H heads the sum of their s * D / H; 0 before the first token."""
        return sum(ring.num_floats for ring in self.rings)


class HSM(DeclaringModule):
    """m[t] = M(u[t], u[t - s]) with u the layer's input (already normalised) and s = 2^l (arXiv 2601.22852, our reading).

    backend: of kernels/shift_mix, for constant, vector and multihead.

    Raises:
        ValueError: the width cannot be cut into the heads.
    """

    def __init__(self, config: HSMConfig, place: Place) -> None:
        super().__init__()
        if config.num_heads and place.d_model % config.num_heads:
            raise ValueError(
                f"model.hsm.num_heads must divide model.d_model, but num_heads is {config.num_heads} and d_model is {place.d_model}: "
                "change one of them"
            )
        self.backend = "torch"
        self.boundary: Boundary = config.boundary
        self.shifts = config.shifts(place.mixers, depth=place.depth)
        self.mixing = mixing(config, d_model=place.d_model, num_layers=place.num_layers)

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Of the token and of the shifted one, where nothing but these is done to them: what kernels/shift_mix computes."""
        return self.mixing.factors if isinstance(self.mixing, LinearMix) else None

    def forward(self, x_BSD: Tensor, context: BatchContext, cache: HSMCache | None = None) -> LayerOutput:
        """y (B, S, D) in the dtype of x. With a cache, x are the next S >= 1 positions after `cache.length` earlier ones."""
        if cache is not None and context.document_ids_BS is not None:
            raise ValueError(
                "decoding takes rows of one document each, but a cache and document ids are given: leave out the document ids"
            )
        factors = self.factors
        if factors is not None and (cache is None or x_BSD.shape[1] == 1):
            return LayerOutput(self._scaled(x_BSD, *factors, context.document_ids_BS, cache))
        rings = [None] * len(self.shifts) if cache is None else cache.rings
        shifted = []
        for u_BSX, amount, past in zip(x_BSD.chunk(len(self.shifts), dim=-1), self.shifts, rings, strict=True):
            shifted.append(
                shift(u_BSX, amount, boundary=self.boundary, document_ids_BS=context.document_ids_BS, past=past)
            )
            if past is not None:
                past.append(u_BSX)
        v_BSD = shifted[0] if len(shifted) == 1 else torch.cat(shifted, dim=-1)
        return LayerOutput(self.mixing(x_BSD, v_BSD).to(x_BSD.dtype))

    def _scaled(
        self, x_BSD: Tensor, a_X: Tensor, b_X: Tensor, document_ids_BS: Tensor | None, cache: HSMCache | None
    ) -> Tensor:
        """a x + b v over whole rows, or for one more token of each."""
        if cache is None:
            return shift_mix(
                x_BSD, a_X, b_X, shifts=self.shifts, boundary=self.boundary, document_ids_BS=document_ids_BS,
                backend=self.backend,
            )  # fmt: skip
        slices = (each.chunk(len(self.shifts), dim=-1) for each in (x_BSD[:, 0], a_X, b_X))
        parts = [
            ring.mix(*of_slice, boundary=self.boundary, backend=self.backend)
            for ring, *of_slice in zip(cache.rings, *slices, strict=True)
        ]
        return torch.cat(parts, dim=-1)[:, None]

    def new_cache(self, *, block_length: int) -> HSMCache:
        """An empty cache; the rings have the sizes of the shifts, whatever the length of a block."""
        return HSMCache(self.shifts)
