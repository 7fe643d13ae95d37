"""Where routed rows meet their experts: the Dispatcher that every expert layer is handed, and its one-process form.

The four verbs of an expert layer are route, dispatch, grouped_matmul, combine. A layer describes its choices in a `Routing`; `plan`
makes an exchange of it; `dispatch` brings rows and gates to the owners of the experts; `combine` brings the partial results back.
What arrives is always a `LocalPlan`, so a layer sees the same thing on one process and on a thousand. parallel/expert.py has the form
that crosses processes.

Shape letters: N routings, K choices each, C routed copies held here, R received rows, L local expert groups, X any width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from model.parameters import ExpertBank


@dataclass(frozen=True)
class Routing:
    """N routings of K choices each. Routing n reads source row `source_row_N[n]` and adds its K gated results to `output_row_N[n]`.

    gates_NK float32, differentiable. expert_ids_NK int64, global group ids of `bank`, in [0, G). num_rows and num_outputs: sizes of
    the row space and of the output space on this rank. V reads the token and writes (token, head), O the reverse, an MLP token to
    token.
    """

    gates_NK: Tensor
    expert_ids_NK: Tensor
    source_row_N: Tensor
    output_row_N: Tensor
    num_rows: int
    num_outputs: int
    bank: ExpertBank


@dataclass(frozen=True)
class LocalPlan:
    """The routed copies whose experts live here, sorted by local group.

    row_index_C: the received row that a copy reads. output_index_C: the output row it adds to. gates_C: float32, differentiable.
    offsets_L: int32, the end of each group's range of copies. num_outputs: output rows to produce.
    """

    row_index_C: Tensor
    output_index_C: Tensor
    gates_C: Tensor
    offsets_L: Tensor
    num_outputs: int


Result = TypeVar("Result")
ResultOut = TypeVar("ResultOut", covariant=True)


class Pending(Protocol[ResultOut]):
    """Something under way. `wait` is called once; work put between start and wait may overlap with it."""

    def wait(self) -> ResultOut: ...


@dataclass(frozen=True)
class Ready(Generic[Result]):
    """A Pending whose result is there."""

    result: Result

    def wait(self) -> Result:
        return self.result


class Dispatcher(Protocol):
    """Carries rows to the owners of their experts and results back. Every rank must make the same calls in the same order."""

    def plan(self, *routings: Routing) -> Sequence[Any]:
        """One exchange per routing; the counts of all of them travel at once."""
        ...

    def dispatch(self, exchange: Any, rows: Tensor, *, label: str) -> Pending[tuple[Tensor, LocalPlan]]:
        """Sends rows (num_rows, X) and the gates; gives the received rows (R, X) and the plan of this rank's experts."""
        ...

    def combine(self, exchange: Any, partials: Tensor, *, label: str) -> Pending[Tensor]:
        """Sends partials (plan.num_outputs, X) home and sums them per output row: (num_outputs, X), differentiable."""
        ...

    def weights(self, exchange: Any) -> Pending[dict[str, Tensor]]:
        """The weights of the routing's bank to compute with, by name: gathered over the expert group, or the local ones."""
        ...

    def gather(self, bank: ExpertBank, rows: Tensor, *, label: str) -> Pending[Tensor]:
        """Gives the rows (num_local, X) that each rank has of its groups of `bank` to all: (num_groups, X), differentiable."""
        ...


@dataclass(frozen=True)
class _LocalExchange:
    plan: LocalPlan
    bank: ExpertBank


class LocalDispatcher:
    """Dispatcher of one process: every expert lives here, nothing travels."""

    def plan(self, *routings: Routing) -> list[_LocalExchange]:
        return [_LocalExchange(self._plan(routing), routing.bank) for routing in routings]

    @staticmethod
    def _plan(routing: Routing) -> LocalPlan:
        num_choices = routing.expert_ids_NK.shape[1]
        ids_C, order_C = routing.expert_ids_NK.flatten().sort(stable=True)
        routing_C = order_C // num_choices
        return LocalPlan(
            row_index_C=routing.source_row_N[routing_C],
            output_index_C=routing.output_row_N[routing_C],
            gates_C=routing.gates_NK.flatten()[order_C],
            offsets_L=group_ends(ids_C, routing.bank.num_groups),
            num_outputs=routing.num_outputs,
        )

    def dispatch(self, exchange: _LocalExchange, rows: Tensor, *, label: str) -> Ready[tuple[Tensor, LocalPlan]]:
        return Ready((rows, exchange.plan))

    def combine(self, exchange: _LocalExchange, partials: Tensor, *, label: str) -> Ready[Tensor]:
        return Ready(partials)

    def weights(self, exchange: _LocalExchange) -> Ready[dict[str, Tensor]]:
        return Ready(exchange.bank.weights())

    def gather(self, bank: ExpertBank, rows: Tensor, *, label: str) -> Ready[Tensor]:
        return Ready(rows)


def group_ends(sorted_ids_C: Tensor, num_groups: int) -> Tensor:
    """int32 (num_groups,): for each group the end of its range in ids sorted in ascending order."""
    groups = torch.arange(num_groups, device=sorted_ids_C.device)
    return torch.searchsorted(sorted_ids_C, groups, right=True).to(torch.int32)
