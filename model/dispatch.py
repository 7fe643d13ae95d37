"""Where routed rows meet their experts: the Dispatcher that every expert layer is handed, and its one-process form.

The four verbs of an expert layer are route, dispatch, grouped_matmul, combine. A layer describes its choices in a `Routing`; `plan`
makes an exchange of it; `dispatch` brings rows and gates to the owners of the experts; `combine` has the experts compute what has
arrived and brings their partial results back. What arrives comes with a `LocalPlan`, so a layer sees the same thing on one process and
on a thousand. parallel/expert.py has the form that crosses processes; there rows may arrive in parts, one computed while the next
travels.

Shape letters: N routings, K choices each, C routed copies held here, R received rows, P output rows, L local expert groups, X and Y any
widths.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from kernels.sort_routes import SortedRoutes, sort_routes
from kernels.sum_copies import RowCopies
from model.owners import GlobalIds, same_ids
from model.parameters import ExpertBank


@dataclass(frozen=True)
class Routing:
    """N routings of K choices each. Routing n reads source row `source_row_N[n]` and adds its K gated results to `output_row_N[n]`.

    gates_NK float32, differentiable; None where `combine` is given them. expert_ids_NK int64, global group ids of `bank`, in [0, G).
    source_row_N and output_row_N ascend; they are one tensor where the two spaces are one.
    num_rows and num_outputs: sizes of the row space and of the output space on this rank. hashes_N: int64, reach the owner with every
    copy. V reads the token and writes (token, head), O the reverse, an MLP token to token.
    """

    gates_NK: Tensor | None
    expert_ids_NK: Tensor
    source_row_N: Tensor
    output_row_N: Tensor
    num_rows: int
    num_outputs: int
    bank: ExpertBank
    hashes_N: Tensor | None = None


@dataclass(frozen=True)
class Copies:
    """Routed copies in the order in which they came: group_C of the `num_groups` held here, row and output row of each (both ascend),
    their hashes. global_ids: see LocalPlan.
    """

    group_C: Tensor
    row_C: Tensor
    output_C: Tensor
    hashes_C: Tensor | None
    num_groups: int
    num_outputs: int
    global_ids: GlobalIds = same_ids

    def sort(self) -> "LocalPlan":
        """The plan, with gates of ones."""
        routes = sort_routes(self.group_C, num_groups=self.num_groups)
        row_index_C = self.row_C.index_select(0, routes.order_C)  # indexing by [] takes 5 times as long on a CPU
        return LocalPlan(
            row_index_C=row_index_C,
            output_index_C=row_index_C
            if self.output_C is self.row_C
            else self.output_C.index_select(0, routes.order_C),
            gates_C=torch.ones(len(row_index_C), device=row_index_C.device),
            offsets_L=routes.offsets_G,
            num_outputs=self.num_outputs,
            hashes_C=None if self.hashes_C is None else self.hashes_C[routes.order_C],
            global_ids=self.global_ids,
            sorting=Sorting(self, routes),
        )


@dataclass(frozen=True)
class Sorting:
    """What a plan was sorted from, and how."""

    came: Copies
    routes: SortedRoutes


@dataclass(frozen=True)
class Whole:
    """The choices of a routing whose experts are all here, as the layer made them; see Routing. num_groups: without padding."""

    gates_NK: Tensor
    expert_ids_NK: Tensor
    num_groups: int


@dataclass(frozen=True)
class LocalPlan:
    """The routed copies whose experts live here, sorted by local group.

    row_index_C: the received row that a copy reads. output_index_C: the output row it adds to. gates_C: float32, differentiable; ones
    before they are known. offsets_L: int32, the end of each group's range of copies. num_outputs: output rows to produce. hashes_C:
    the routing's, where it has any. global_ids: makes global ids of local groups. whole: the routing's choices, where none of its
    copies is elsewhere.
    """

    row_index_C: Tensor
    output_index_C: Tensor
    gates_C: Tensor
    offsets_L: Tensor
    num_outputs: int
    hashes_C: Tensor | None = None
    global_ids: GlobalIds = same_ids
    sorting: Sorting | None = None
    whole: Whole | None = None

    def with_gates(self, gates_C: Tensor) -> "LocalPlan":
        """The plan with the gates of its copies; gates_C (C,) in the order in which the copies came. Differentiable."""
        return replace(self, gates_C=self.as_sorted(gates_C))

    def as_sorted(self, found_C: Tensor) -> Tensor:
        """What was found for the copies in the order in which they came, in the order of the plan. Differentiable."""
        assert self.sorting is not None
        return _Permuted.apply(found_C, self.sorting.routes.order_C, self.sorting.routes.inverse_C)

    def as_they_came(self, found_C: Tensor) -> Tensor:
        """What was found for the copies of the plan, in the order in which they came. Differentiable."""
        assert self.sorting is not None
        return _Permuted.apply(found_C, self.sorting.routes.inverse_C, self.sorting.routes.order_C)

    def output_copies(self) -> RowCopies | None:
        """The copies of each output row, for kernels that sum them: no sort, because copies came in the order of their output rows."""
        return None if self.sorting is None else self._copies_of(self.sorting.came.output_C, self.num_outputs)

    def row_copies(self, num_rows: int) -> RowCopies | None:
        """The copies of each of the received rows."""
        return None if self.sorting is None else self._copies_of(self.sorting.came.row_C, num_rows)

    def _copies_of(self, ascending_C: Tensor, num_rows: int) -> RowCopies:
        assert self.sorting is not None
        return RowCopies(self.sorting.routes.inverse_C, group_ends(ascending_C, num_rows))


class _Permuted(torch.autograd.Function):
    """values_C[order_C], whose backward pass reads through the inverse: torch's own would add, on a GPU after another sort."""

    @staticmethod
    def forward(ctx: Any, values_C: Tensor, order_C: Tensor, inverse_C: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_C)
        return values_C.index_select(0, order_C)

    @staticmethod
    def backward(ctx: Any, gradient_C: Tensor) -> tuple[Tensor, None, None]:
        (inverse_C,) = ctx.saved_tensors
        return gradient_C.index_select(0, inverse_C), None, None


Compute = Callable[[Tensor, LocalPlan], Tensor]
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


Before = TypeVar("Before")


@dataclass(frozen=True)
class Then(Generic[Before, Result]):
    """What `function` makes of the result of another Pending."""

    pending: Pending[Before]
    function: Callable[[Before], Result]

    def wait(self) -> Result:
        return self.function(self.pending.wait())


class Dispatcher(Protocol):
    """Carries rows to the owners of their experts and results back. Every rank must make the same calls in the same order."""

    def plan(self, *routings: Routing) -> Sequence[Any]:
        """One exchange per routing; the counts of all of them travel at once."""
        ...

    def dispatch(self, exchange: Any, rows: Tensor, *, label: str) -> Any:
        """Sends rows (num_rows, X), and the gates if the routing has them; gives what `reply` and `combine` take."""
        ...

    def weights(self, exchange: Any, *, label: str) -> Pending[dict[str, Tensor]]:
        """The weights of the routing's bank to compute with, by name: gathered over the expert group, or the local ones."""
        ...

    def reply(self, arriving: Any, compute: Compute, *, label: str) -> Pending[Tensor]:
        """One number for each copy, home: compute(rows (R, X), plan) gives (C,), the routing gets (N, K), differentiable.

        Where a copy went to several ranks, each with some columns of its expert, the sum of theirs.
        """
        ...

    def combine(
        self, arriving: Any, compute: Compute, *, label: str, gates_NK: Tensor | None = None
    ) -> Pending[Tensor]:
        """compute(rows (R, X), plan) gives partials (plan.num_outputs, Y); home they are summed: (num_outputs, Y), differentiable.

        gates_NK: the gates of a routing without any; they are sent first.
        """
        ...

    def gather(self, bank: ExpertBank, rows: Tensor, *, label: str) -> Pending[Tensor]:
        """Gives the rows (num_local, X) that each rank has of its groups of `bank` to all: (num_groups, X), differentiable."""
        ...


def copies_of(routing: Routing, *, num_groups: int) -> Copies:
    """All copies of a routing, n-major, for a rank that has all the groups."""
    num_choices = routing.expert_ids_NK.shape[1]
    row_C = routing.source_row_N.repeat_interleave(num_choices)
    one_space = routing.output_row_N is routing.source_row_N
    return Copies(
        group_C=routing.expert_ids_NK.flatten(),
        row_C=row_C,
        output_C=row_C if one_space else routing.output_row_N.repeat_interleave(num_choices),
        hashes_C=None if routing.hashes_N is None else routing.hashes_N.repeat_interleave(num_choices),
        num_groups=num_groups,
        num_outputs=routing.num_outputs,
    )


@dataclass(frozen=True)
class LocalExchange:
    """A routing whose experts are all here, and its plan."""

    routing: Routing
    plan: LocalPlan

    @staticmethod
    def of(routing: Routing, *, num_groups: int) -> "LocalExchange":
        return LocalExchange(routing, copies_of(routing, num_groups=num_groups).sort())


@dataclass(frozen=True)
class LocalArriving:
    """Rows that stay where they are."""

    exchange: LocalExchange
    rows: Tensor

    def reply(self, compute: Compute) -> Tensor:
        plan = self.exchange.plan
        return plan.as_they_came(compute(self.rows, plan)).view_as(self.exchange.routing.expert_ids_NK)

    def combine(self, compute: Compute, gates_NK: Tensor | None) -> Tensor:
        gates_NK = self.exchange.routing.gates_NK if gates_NK is None else gates_NK
        assert gates_NK is not None
        routing, plan = self.exchange.routing, self.exchange.plan.with_gates(gates_NK.flatten())
        whole = Whole(gates_NK, routing.expert_ids_NK, routing.bank.num_groups)
        return compute(self.rows, replace(plan, whole=whole))


class LocalDispatcher:
    """Dispatcher of one process: every expert lives here, nothing travels."""

    def plan(self, *routings: Routing) -> list[LocalExchange]:
        return [LocalExchange.of(routing, num_groups=routing.bank.num_groups) for routing in routings]

    def dispatch(self, exchange: LocalExchange, rows: Tensor, *, label: str) -> LocalArriving:
        return LocalArriving(exchange, rows)

    def weights(self, exchange: LocalExchange, *, label: str) -> Ready[dict[str, Tensor]]:
        return Ready(exchange.routing.bank.weights())

    def reply(self, arriving: LocalArriving, compute: Compute, *, label: str) -> Ready[Tensor]:
        return Ready(arriving.reply(compute))

    def combine(
        self, arriving: LocalArriving, compute: Compute, *, label: str, gates_NK: Tensor | None = None
    ) -> Ready[Tensor]:
        return Ready(arriving.combine(compute, gates_NK))

    def gather(self, bank: ExpertBank, rows: Tensor, *, label: str) -> Ready[Tensor]:
        return Ready(rows)


def group_ends(sorted_ids_C: Tensor, num_groups: int) -> Tensor:
    """int32 (num_groups,): for each group the end of its range in ids sorted in ascending order."""
    groups = torch.arange(num_groups, device=sorted_ids_C.device)
    return torch.searchsorted(sorted_ids_C, groups, right=True).to(torch.int32)
