"""Transformer-XL state memory of a run: for each stream of the data, what the layers were given in its last rows.

Owns the tensors, when they are emptied, and their names in a checkpoint. The layers see a `Memory` (model/context.py) of the rows at
hand and know nothing of streams. Used by train/step.py and train/evaluate.py. Shape letters: B rows, S positions of a row, M positions
of memory, D width; suffix Z: streams of this process.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from model.context import Memory


class StreamMemory:
    """The memory of one process's streams. Row p belongs to stream p mod `num_streams` and continues row p - num_streams.

    It is emptied where the batch says that a row does not continue, and where another row was expected (the position jumped).
    """

    def __init__(
        self,
        blocks: Mapping[int, int],
        *,
        row_length: int,
        d_model: int,
        num_streams: int,
        rank: int,
        num_ranks: int,
        device: torch.device,
    ) -> None:
        """blocks: by depth of each layer with memory, how many rows of `row_length` positions it remembers (at least one).

        Rank r of n has the streams s with s mod n = r, as data/order.py deals the rows; n divides num_streams.
        """
        self.num_streams = num_streams
        self.streams = range(rank, num_streams, num_ranks)
        self._num_ranks = num_ranks
        self._states: dict[int, Tensor] = {  # by depth (Z, M, D)
            depth: torch.zeros(len(self.streams), number * row_length, d_model, device=device)
            for depth, number in blocks.items()
        }
        self._filled_Z = torch.zeros(len(self.streams), dtype=torch.int64, device=device)
        self._next_Z = torch.full_like(self._filled_Z, -1)  # the row that each stream expects; -1: none was seen

    def read(self, positions_B: Tensor, continues_B: Tensor) -> Memory:
        """The memory of these rows, in their order; all of one micro-step, so no stream twice."""
        slots_B = self._slots(positions_B)
        fresh_B = ~continues_B.to(slots_B.device) | (self._next_Z[slots_B] != positions_B.to(slots_B.device))
        self._filled_Z[slots_B] = self._filled_Z[slots_B].masked_fill(fresh_B, 0)
        states = {depth: state_ZMD[slots_B] for depth, state_ZMD in self._states.items()}
        # what is not filled cannot be seen; zeros all the same, so that nothing depends on a row that is gone
        states = {depth: state_BMD.masked_fill(fresh_B[:, None, None], 0.0) for depth, state_BMD in states.items()}
        return Memory(states, self._filled_Z[slots_B])

    def write(self, memory: Memory, positions_B: Tensor, layer_inputs: Mapping[int, Tensor]) -> None:
        """Remembers the rows that were just computed with `memory`: layer_inputs by depth, (B, S, D) without gradient."""
        slots_B = self._slots(positions_B)
        for depth, state_ZMD in self._states.items():
            longer = torch.cat([memory.states[depth], layer_inputs[depth]], dim=1)
            state_ZMD[slots_B] = longer[:, -state_ZMD.shape[1] :]
        self._filled_Z[slots_B] = memory.filled_B + next(iter(layer_inputs.values())).shape[1]
        self._next_Z[slots_B] = positions_B.to(slots_B.device) + self.num_streams

    def tensors(self) -> dict[str, Tensor]:
        """By name, what a checkpoint must hold of this process's streams: for each its states, depth after depth, and its place."""
        named = {}
        for slot, stream in enumerate(self.streams):
            named[_states_name(stream)] = torch.cat([state_ZMD[slot] for state_ZMD in self._states.values()])
            named[_place_name(stream)] = torch.stack([self._filled_Z[slot], self._next_Z[slot]])
        return named

    def names(self) -> list[str]:
        """The names that `restore` needs."""
        return [name for stream in self.streams for name in (_states_name(stream), _place_name(stream))]

    def restore(self, named: Mapping[str, Tensor]) -> None:
        """Takes this process's streams out of a checkpoint's tensors, whatever layout wrote them."""
        sizes = [state_ZMD.shape[1] for state_ZMD in self._states.values()]
        for slot, stream in enumerate(self.streams):
            for state_ZMD, part_MD in zip(self._states.values(), named[_states_name(stream)].split(sizes), strict=True):
                state_ZMD[slot] = part_MD.to(state_ZMD.device)
            self._filled_Z[slot], self._next_Z[slot] = named[_place_name(stream)].to(self._next_Z.device)

    def _slots(self, positions_B: Tensor) -> Tensor:
        return (positions_B % self.num_streams // self._num_ranks).to(self._filled_Z.device)


def _states_name(stream: int) -> str:
    return f"memory.{stream:06d}.states"


def _place_name(stream: int) -> str:
    return f"memory.{stream:06d}.place"
