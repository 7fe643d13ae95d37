"""Logical parameters: what a weight is called, how large it is in all, how it is drawn, and which part of it lives here.

A *logical parameter* is a weight as one process would hold it: all experts, no padding. Modules declare theirs on the meta device;
`parallel/parallelize.py` may narrow an expert bank to the groups of this rank; `materialize` then draws what is owned here. Every
block (one expert group, so many rows of a table, else the whole tensor) has its own generator seeded by (seed, name, block), so the
values are the same at every layout and no rank draws what it does not own (of a table's block that several ranks share, each draws all).
Checkpoints speak of the same names and shapes (model/fragments.py).

Does not own: the optimizer's storage of these weights (train/engine.py, parallel/zero.py).
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.owners import OwnerTable, Range, Seats

Initializer = Callable[[tuple[int, ...], torch.Generator], Tensor]
BankWeights = dict[str, tuple[tuple[int, ...], Initializer]]  # by name: the shape of one group's, and how it is drawn
Box = tuple[tuple[int, int], ...]  # [first, end) of each dimension of a logical tensor


def normal(std: float) -> Initializer:
    """Draws N(0, std^2)."""
    return lambda shape, generator: torch.empty(shape).normal_(0.0, std, generator=generator)


def uniform(bound: float) -> Initializer:
    """Draws from [-bound, bound]."""
    return lambda shape, generator: torch.empty(shape).uniform_(-bound, bound, generator=generator)


def truncated_normal(std: float) -> Initializer:
    """Draws a normal cut at two standard deviations, then scaled so that the tensor's own standard deviation is `std`."""

    def draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        values = nn.init.trunc_normal_(torch.empty(shape), generator=generator)
        return values * (std / values.std())

    return draw


def zeros(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.zeros(shape)


def ones(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.ones(shape)


@dataclass(frozen=True)
class ParameterSpec:
    """What a declared parameter is: `shape` in all (no padding), and how a block of it is drawn.

    decays: weight decay is for it if it is a matrix (train/optimizer.py).
    """

    shape: tuple[int, ...]
    draw: Initializer
    decays: bool = True


class DeclaringModule(nn.Module):
    """A module that declares its parameters instead of making them: they stay on the meta device until `materialize`."""

    def __init__(self) -> None:
        super().__init__()
        self.specs: dict[str, ParameterSpec] = {}
        self.states: dict[str, float] = {}

    def declare(self, name: str, shape: tuple[int, ...], draw: Initializer, *, decays: bool = True) -> None:
        self.specs[name] = ParameterSpec(shape, draw, decays)
        self.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta")))

    def declare_state(self, name: str, shape: tuple[int, ...], *, value: float = 0.0) -> None:
        """A buffer that starts at `value`, is the same on every rank and part of checkpoints, but has no gradient."""
        self.states[name] = value
        self.register_buffer(name, torch.empty(shape, device="meta"))


class ExpertBank(DeclaringModule):
    """The stacked weights of G expert groups, of which this process holds `num_local` beginning with global group `first_group`.

    Declared whole; on one process num_local = G. `shard` narrows the bank to one rank of an expert group: L = ceil(G / size) groups on
    every rank, the padding at the end of the global order, so that all ranks hold tensors of one shape; a rank may hold nothing but
    padding. Padding is zero, cannot be selected and is never saved. backend: how the experts are computed (model/expert_choice.py).
    seats: where the groups sit; once they have moved (parallel/placement.py) first_group means nothing.
    """

    def __init__(self, num_groups: int, weights: BankWeights, *, backend: str = "reference", decays: bool = True):
        super().__init__()
        self.backend = backend
        self.num_groups, self.num_ranks, self.rank = num_groups, 1, 0
        self.first_group, self.num_local = 0, num_groups
        self.seats = Seats(num_groups, first_group=0)
        self.columns, self.column = 1, 0
        for name, (shape, draw) in weights.items():
            self.declare(name, (num_groups, *shape), draw, decays=decays)

    def weights(self) -> dict[str, Tensor]:
        """The local weights by name, (num_local, ...) each."""
        return dict(self.named_parameters(recurse=False))

    def shard(self, *, rank: int, size: int) -> None:
        """Keeps the groups of rank `rank` of `size`; owner of group g = g div L. Must come before `materialize`."""
        self.num_ranks, self.rank = size, rank
        self.num_local = math.ceil(self.num_groups / size)
        self.first_group = rank * self.num_local
        self.seats = Seats(self.num_groups, first_group=self.first_group)
        for name, spec in self.specs.items():
            shape = (self.num_local, *spec.shape[1:])
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta")))

    def place(self, table: OwnerTable) -> None:
        """From now on the groups sit as `table` says; who calls it moves the weights. Must come after `materialize`."""
        self.seats = Seats.at(table, rank=self.rank, device=next(self.parameters()).device)


class Table(ExpertBank):
    """A bank of so many small groups, the rows of a product-key table, that they are drawn `rows_per_block` at a time.

    The blocks do not depend on the sharding. Weight decay is not for tables: most rows get no gradient in a step (our reading). The
    width of each weight may be split too, in `columns` equal ranges, of which this is number `column`.
    """

    rows_per_block = 1024

    def __init__(self, num_rows: int, weights: BankWeights) -> None:
        super().__init__(num_rows, weights, backend="torch", decays=False)

    def shard(self, *, rank: int, size: int, columns: int = 1) -> None:
        """Keeps a range of rows and one of columns: rank = row shard * columns + column; num_ranks is then the number of row shards.

        Raises:
            ValueError: `columns` does not divide the ranks or a weight's width.
        """
        widths = {f"width of {name}": spec.shape[-1] for name, spec in self.specs.items()}
        for what, value in {"ranks that share it": size, **widths}.items():
            if value % columns:
                raise ValueError(
                    f"a table's columns must divide the {what}, but they are {columns} and the {what} {value}: "
                    "set parallel.table_columns to a divisor"
                )
        super().shard(rank=rank // columns, size=size // columns)
        self.columns, self.column = columns, rank % columns
        for name, weight in self.weights().items():
            self.register_parameter(name, nn.Parameter(weight.detach().chunk(columns, dim=-1)[0].contiguous()))


@dataclass(frozen=True)
class LogicalParameter:
    """A declared parameter found in a model: its name, its spec, the module that holds it and the elements that this process has."""

    name: str
    spec: ParameterSpec
    module: DeclaringModule
    attribute: str

    @property
    def tensor(self) -> nn.Parameter:
        return getattr(self.module, self.attribute)

    @property
    def box(self) -> Box | None:
        """The part of the logical tensor that is here, without padding, if its columns are split; else None: the whole tensor."""
        bank = self.module
        if not isinstance(bank, ExpertBank) or bank.columns == 1:
            return None
        first, end = (min(row, bank.num_groups) for row in (bank.first_group, bank.first_group + bank.num_local))
        width = self.spec.shape[-1] // bank.columns
        return ((first, end), (bank.column * width, (bank.column + 1) * width))

    @property
    def start(self) -> int:
        """Offset of the local tensor's first element in the flat `box`; for a bank without a table."""
        if self.box is not None or not isinstance(self.module, ExpertBank):
            return 0
        return self.module.first_group * math.prod(self.spec.shape[1:])

    @property
    def numel(self) -> int:
        """Elements of the local tensor that are not padding, which is at its end; for a bank without a table."""
        size = math.prod(end - first for first, end in self.box or ((0, size) for size in self.spec.shape))
        return max(0, min(self.tensor.numel(), size - self.start))

    @property
    def ranges(self) -> list[Range]:
        """What of the local tensor is no padding, and where it lies in the flat `box`."""
        if isinstance(self.module, ExpertBank) and self.module.seats.has_moved:
            return self.module.seats.ranges(math.prod(self.spec.shape[1:]))
        return [Range(0, self.start, self.numel)] if self.numel else []


def logical_parameters(model: nn.Module) -> Iterator[LogicalParameter]:
    """Every parameter of `model` in module order, which is the same at every layout.

    Raises:
        RuntimeError: a parameter was made without being declared: it would be missing from checkpoints.
    """
    for path, module in model.named_modules():
        for attribute, _ in module.named_parameters(recurse=False):
            name = f"{path}.{attribute}" if path else attribute
            if not isinstance(module, DeclaringModule) or attribute not in module.specs:
                raise RuntimeError(f"every parameter must be declared, but {name} was not: use DeclaringModule.declare")
            yield LogicalParameter(name, module.specs[attribute], module, attribute)


def logical_states(model: nn.Module) -> Iterator[tuple[str, DeclaringModule, str]]:
    """Path, module and attribute of every declared state, in module order.

    Raises:
        RuntimeError: a buffer was made without being declared: it would be missing from checkpoints.
    """
    for path, module in model.named_modules():
        for attribute, _ in module.named_buffers(recurse=False):
            name = f"{path}.{attribute}" if path else attribute
            if not isinstance(module, DeclaringModule) or attribute not in module.states:
                raise RuntimeError(
                    f"every buffer must be declared, but {name} was not: use DeclaringModule.declare_state"
                )
            yield name, module, attribute


def states_of(model: nn.Module) -> dict[str, Tensor]:
    """Every state by path: what a checkpoint holds of it."""
    return {name: getattr(module, attribute) for name, module, attribute in logical_states(model)}


@torch.no_grad()
def add_updates(model: nn.Module, updates: Mapping[str, Tensor]) -> None:
    """Adds to states, by path, what a training micro-step has found (model/layer.py)."""
    for name, update in updates.items():
        model.get_buffer(name).add_(update)


def count_parameters(model: nn.Module) -> int:
    """Number of weights in all: every expert once, no padding, whatever this process holds."""
    return sum(math.prod(parameter.spec.shape) for parameter in logical_parameters(model))


def materialize(
    model: nn.Module, *, seed: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> None:
    """Allocates and draws every parameter held here. Blocks are drawn on the CPU in float32 so that all devices agree."""
    for parameter in list(logical_parameters(model)):
        values = torch.zeros(parameter.tensor.shape, dtype=dtype, device=device)
        for block in _local_blocks(parameter, values):
            generator = torch.Generator().manual_seed(_block_seed(seed, parameter.name, block.number))
            block.target.copy_(parameter.spec.draw(block.shape, generator)[block.part])
        setattr(parameter.module, parameter.attribute, nn.Parameter(values))
    for _, module, attribute in logical_states(model):
        shape = getattr(module, attribute).shape
        setattr(module, attribute, torch.full(shape, module.states[attribute], dtype=dtype, device=device))


class _Block(NamedTuple):
    """A block that is drawn whole, and `target`, the part of the local tensor that `part` of it goes to."""

    number: int
    shape: tuple[int, ...]
    part: tuple[Any, ...]
    target: Tensor


def _local_blocks(parameter: LogicalParameter, values: Tensor) -> Iterator[_Block]:
    bank, whole = parameter.module, (...,)
    if not isinstance(bank, ExpertBank):
        yield _Block(0, tuple(values.shape), whole, values)
        return
    first, end = bank.first_group, min(bank.first_group + bank.num_local, bank.num_groups)
    if first >= end:  # nothing but padding
        return
    if not isinstance(bank, Table):
        for group in range(first, end):
            yield _Block(group, tuple(values.shape[1:]), whole, values[group - first])
        return
    size, width = bank.rows_per_block, values.shape[-1]
    columns = slice(bank.column * width, (bank.column + 1) * width)
    for number in range(first // size, math.ceil(end / size)):
        start, stop = number * size, min((number + 1) * size, bank.num_groups)
        rows = slice(max(first, start) - start, min(end, stop) - start)
        target = values[start + rows.start - first : start + rows.stop - first]
        yield _Block(number, (stop - start, *parameter.spec.shape[1:]), (rows, columns), target)


def _block_seed(seed: int, name: str, block: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch takes seeds below 2**63
