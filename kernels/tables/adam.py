"""Adam for the rows of a table that a step has touched: its state, its equations, and when it may be used.

Owns: RowAdam and its step in torch, which is what the Triton pass (kernels/tables/by_entry.py) must equal; PendingStep, what a
backward pass keeps to take it. Does not own: the gradient, the schedule of lr, saving the state.
Called by: peer_experts and embedding_bag, which take a RowAdam as `adam`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RowAdam:
    """The lazy, row-wise form of AdamW (arXiv 1711.05101): the backward pass of an op steps the rows of its table that were read.

    Lazy: a row that no copy read neither moves nor decays, its moments stay, and its count does not advance; the bias corrections of a row
    go by its own count. So this equals dense AdamW where every row is read in every step, and differs from it else: dense AdamW goes on
    moving a row by its decaying moments. No gradient of the table is written and none is returned: nothing can clip it, average it over
    ranks, or add it to that of another micro-step. Hence it is for a table that is used once between two backward passes, that no
    other rank holds too, with accumulation_steps 1. A row that several copies read is stepped once.

    Where a table or its state has changed since the forward pass, the step is refused (RuntimeError): a table that is used twice before
    the backward pass, by one layer or by two, is stepped once and then refused, under torch.utils.checkpoint too. Not seen is a change
    through .data, which torch does not count: the step is made from what the table then holds. Not seen are two uses under checkpoint
    with use_reentrant=True, which has no graph in the forward pass: there each use takes a step. Not seen is a gradient that the same
    table gets from an op without adam: it is returned, and whoever owns the table's .grad must spend it.
    Every backward pass through the op is a step, also one that asks for other gradients alone (torch.autograd.grad).

    exp_avg_LD, exp_avg_sq_LD: float32, shape of the table; the second is not negative, which nobody looks at, as it would be a pass over
    the table: the root of a negative one is NaN, and so is then the number that is stepped. steps_L: int32, the steps that each row has
    made. All are changed in place, as is the table, which must be a leaf, float32 and contiguous. No two share a storage. lr, betas,
    eps, weight_decay (decoupled): of torch.optim.AdamW; they are read when the op is called. ValueError: settings outside their range.
    """

    exp_avg_LD: Tensor
    exp_avg_sq_LD: Tensor
    steps_L: Tensor
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if not all(0.0 < beta < 1.0 for beta in self.betas):
            raise ValueError(f"the betas of RowAdam must lie between 0 and 1, got {self.betas}: choose others")
        for name, number, fits in (
            ("lr", self.lr, self.lr >= 0.0),
            ("eps", self.eps, self.eps > 0.0),
            ("weight_decay", self.weight_decay, self.weight_decay >= 0.0),
        ):
            if not (fits and math.isfinite(number)):
                least = "above 0" if name == "eps" else "at least 0"
                raise ValueError(f"the {name} of RowAdam must be finite and {least}, got {number}: choose another")

    @staticmethod
    def zeros(table_LD: Tensor, **settings: float | tuple[float, float]) -> "RowAdam":
        """The state before the first step of a table."""
        moments = [torch.zeros_like(table_LD, dtype=torch.float32, requires_grad=False) for _ in range(2)]
        steps_L = torch.zeros(len(table_LD), dtype=torch.int32, device=table_LD.device)
        return RowAdam(exp_avg_LD=moments[0], exp_avg_sq_LD=moments[1], steps_L=steps_L, **settings)  # type: ignore[arg-type]

    def check(self, table_LD: Tensor) -> None:
        """Raises ValueError unless this is the state of such a table."""
        wanted = {
            "table": (table_LD, table_LD.shape, torch.float32),
            "exp_avg": (self.exp_avg_LD, table_LD.shape, torch.float32),
            "exp_avg_sq": (self.exp_avg_sq_LD, table_LD.shape, torch.float32),
            "steps": (self.steps_L, table_LD.shape[:1], torch.int32),
        }
        for name, (tensor, shape, dtype) in wanted.items():
            if (
                tensor.shape != shape
                or tensor.dtype != dtype
                or tensor.device != table_LD.device
                or not tensor.is_contiguous()
            ):
                raise ValueError(
                    f"RowAdam needs the {name} as a contiguous {list(shape)} of {dtype} on {table_LD.device}, got {list(tensor.shape)} of "
                    f"{tensor.dtype} on {tensor.device}, strides {tensor.stride()}: make its state with RowAdam.zeros(table)"
                )

    @torch.no_grad()
    def step(self, table_LD: Tensor, rows_U: Tensor, gradient_UD: Tensor) -> None:
        """Steps the rows rows_U (int64, each once) of the table by their gradient; what the kernel equals."""
        beta_1, beta_2 = self.betas
        self.steps_L.index_add_(0, rows_U, torch.ones_like(rows_U, dtype=torch.int32))
        steps_U1 = self.steps_L[rows_U, None].double()
        gradient_UD = gradient_UD.float()
        first_UD = self.exp_avg_LD[rows_U].lerp(gradient_UD, 1.0 - beta_1)
        second_UD = self.exp_avg_sq_LD[rows_U].mul(beta_2).addcmul(gradient_UD, gradient_UD, value=1.0 - beta_2)
        step_U1 = (self.lr / (1.0 - beta_1**steps_U1)).float()
        scale_U1 = (1.0 - beta_2**steps_U1).sqrt().float()
        values_UD = table_LD[rows_U] * (1.0 - self.lr * self.weight_decay)
        values_UD -= step_U1 * first_UD / (second_UD.sqrt() / scale_U1 + self.eps)
        for tensor, new_UD in ((self.exp_avg_LD, first_UD), (self.exp_avg_sq_LD, second_UD), (table_LD, values_UD)):
            tensor.index_copy_(0, rows_U, new_UD)

    @property
    def state(self) -> list[Tensor]:
        """What the operation is handed, beside `settings`."""
        return [self.exp_avg_LD, self.exp_avg_sq_LD, self.steps_L]

    @property
    def settings(self) -> list[float]:
        """lr, eps, decay of a step, and of each moment its beta's logarithm (base 2) and 1 - beta: what float32 would round away."""
        of_betas = [number for beta in self.betas for number in (math.log2(beta), 1.0 - beta)]
        return [self.lr, self.eps, self.lr * self.weight_decay, *of_betas]


@dataclass(frozen=True)
class PendingStep:
    """The step of a table that a backward pass will take, kept as a plain attribute of its context.

    Not saved for the backward pass: hooks on saved tensors may give back a copy, and a step of a copy is lost; and where a forward pass
    is made again for the backward pass (torch.utils.checkpoint), saved tensors are those of the second one, which cannot tell that the
    table was stepped in between. versions: of table and state, as torch counts their changes in place, at the forward pass.
    """

    table_LD: Tensor
    state: Sequence[Tensor]
    settings: Sequence[float]
    versions: Sequence[int]

    def table(self) -> Tensor:
        """The table, with the values of the forward pass. Raises RuntimeError where these are gone."""
        versions = [tensor._version for tensor in (self.table_LD, *self.state)]
        if versions != list(self.versions):
            raise RuntimeError(
                f"a backward pass with adam needs its table of {list(self.table_LD.shape)} and its state as they were in the forward pass, "
                f"but they were changed in place since (versions {list(self.versions)}, now {versions}): use the table once between two "
                "backward passes, and change neither between forward and backward"
            )
        return self.table_LD


def pending(
    table_LD: Tensor, state: Sequence[Tensor], settings: Sequence[float], *, needed: bool
) -> PendingStep | None:
    """None without the state of a RowAdam, or where no gradient of the table is needed."""
    if not state or not needed:
        return None
    return PendingStep(table_LD, state, settings, [tensor._version for tensor in (table_LD, *state)])


def without(step: PendingStep | None, table_LD: Tensor) -> Tensor | None:
    """What is saved for the backward pass of a table: nothing where a step keeps it."""
    return table_LD if step is None else None


def table_of(step: PendingStep | None, saved_LD: Tensor) -> Tensor:
    return saved_LD if step is None else step.table()
