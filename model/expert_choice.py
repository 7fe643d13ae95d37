"""How the experts of a bank are computed: which backends could, and the work by which they are compared.

Owns: the candidates, and that work: a forward and a backward pass through model/experts.py on uniform random routes of the run's sizes.
Does not own: the clock (work.py), when it is used, what is kept and logged (train/backends.py).

Shape letters: T tokens, H heads, K choices, N = T H routings, R rows, G expert groups.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kernels.availability import why_not_triton
from kernels.grouped_matmul import why_not_torch
from model.dispatch import Compute, LocalArriving, LocalExchange, Routing
from model.experts import DENSE, gate_then_project, gated_mlp, hidden_factors, project_then_gate
from model.parameters import ExpertBank, zeros
from model.section import BankShape
from model.work import Exchange, Work


@dataclass(frozen=True)
class BankWork(Work):
    """What the experts of a bank do on one rank in a micro-step.

    bank: any but a table. tokens: of the rank, those of memory included. num_groups: computed with here, those of padding included.
    exchange: see model/work.py. dtype: of the products, and of what travels; of the rest only the rows that attention gives have it.
    keep_hidden: see sigma-MoE's config. open_gates: all are 1 and get no gradient (Avg-K).
    """

    bank: BankShape
    tokens: int
    num_groups: int
    exchange: Exchange | None
    dtype: torch.dtype
    keep_hidden: bool = False
    open_gates: bool = False

    @property
    def widths(self) -> tuple[int, int]:
        """X and Y of a group's matrix; of the two of an MLP the first one's."""
        rows = self.bank.row_dim
        return (rows, self.bank.group_numel // (2 * rows)) if self._is_mlp else (rows, self.bank.output_dim)

    @property
    def whole(self) -> bool:
        """All groups are here, so that a token's choices are known together."""
        return self.exchange != "tokens"

    def __str__(self) -> str:
        """All that the time depends on."""
        bank = self.bank
        sizes = f"{self.num_groups} groups of {' x '.join(map(str, self.widths))}{' twice' if self._is_mlp else ''}"
        choices = f"{self.tokens} tokens, {bank.num_heads} x {bank.top_k} choices"
        hidden = ", hidden kept" * (self.keep_hidden and self._is_mlp) + ", hidden dropped" * bank.hashed
        gates = ", gates open" * self.open_gates
        return f"{bank.label}: {sizes}, {choices}, {self.dtype}, {self.exchange or 'nothing'} sent{hidden}{gates}"

    @property
    def _is_mlp(self) -> bool:
        return self.bank.same_rows

    def candidates(self, device_type: str) -> list[str]:
        """On a CPU the two give the same bits, so that a clock may choose; on a GPU what is chosen must be kept."""
        by_torch = ["torch"] * (why_not_torch(self.dtype, device_type=device_type, widths=self.widths) is None)
        if device_type == "cpu":
            return [*by_torch, "loop"]
        if why_not_triton(device_type):
            return by_torch or ["loop"]
        return ["triton", *[DENSE] * (self.whole and not self._is_mlp), *by_torch]

    def work(self, backend: str, *, device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
        """The output, and the gradients of rows, weights and, where they learn, gates."""
        generator = torch.Generator(device).manual_seed(0)
        normal = partial(torch.randn, generator=generator, device=device)
        bank, compute = self._experts(backend, normal)
        routing = self._routing(bank, normal)
        narrow = self.exchange == "tokens" or self.bank.label == "output"
        row_dtype = self.dtype if narrow else torch.float32
        rows = normal(routing.num_rows, self.bank.row_dim).to(row_dtype).requires_grad_()
        arriving = LocalArriving(LocalExchange.of(routing, num_groups=self.num_groups), rows)
        gradient = normal(routing.num_outputs, self.bank.output_dim).to(self.dtype)
        assert routing.gates_NK is not None
        leaves = [rows, *bank.weights().values(), *[routing.gates_NK] * (not self.open_gates)]

        def work() -> tuple[Tensor, ...]:
            with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
                output = arriving.combine(compute, None)
            return output, *torch.autograd.grad(output, leaves, gradient)

        return work

    def _experts(self, backend: str, normal: Callable[..., Tensor]) -> tuple[ExpertBank, Compute]:
        x, y = self.widths
        shapes = {"up": (x, y), "down": (y, x)} if self._is_mlp else {"weight": (x, y)}
        routed = self.bank.num_groups if self.whole else self.num_groups
        bank = ExpertBank(routed, {name: (shape, zeros) for name, shape in shapes.items()})
        dtype = self.dtype if self.exchange == "weights" else torch.float32
        for name, shape in shapes.items():
            values = normal(self.num_groups, *shape) / x**0.5
            bank.register_parameter(name, torch.nn.Parameter(values.to(dtype)))
        weights = bank.weights()
        if self._is_mlp:
            mlp = partial(gated_mlp, backend=backend, keep_hidden=self.keep_hidden)
            drop = partial(hidden_factors, channels=y, probability=0.5)  # in training made anew in each pass, too
            return bank, lambda rows, plan: mlp(
                rows, weights["up"], weights["down"], plan, factors_CF=drop(plan) if self.bank.hashed else None
            )
        project = gate_then_project if self.bank.label == "output" else project_then_gate
        projection = partial(project, backend=backend, num_heads=self.bank.num_heads)
        return bank, lambda rows, plan: projection(rows, weights["weight"], plan)

    def _routing(self, bank: ExpertBank, normal: partial[Tensor]) -> Routing:
        """As many copies as a rank has on average; where all groups are here, the choices of a (token, head) are distinct."""
        heads, tokens, top_k = self.bank.num_heads, self.tokens, self.bank.top_k
        of_head = bank.num_groups // heads
        if self.whole:
            chosen_THK = normal(tokens, heads, of_head).topk(top_k).indices
            chosen_THK += torch.arange(heads, device=chosen_THK.device)[:, None] * of_head
        else:
            chosen_THK = torch.randint(self.num_groups, (tokens, heads, top_k), **normal.keywords)
        device = chosen_THK.device
        pair_N = torch.arange(tokens * heads, device=device)
        spaces = {1: pair_N // heads, heads: pair_N}  # with one head they are the same
        return Routing(
            gates_NK=normal(tokens * heads, top_k).sigmoid().requires_grad_(not self.open_gates),
            expert_ids_NK=chosen_THK.view(-1, top_k),
            source_row_N=pair_N if self._is_mlp else spaces[self.bank.rows_per_token],
            output_row_N=pair_N if self._is_mlp else spaces[self.bank.outputs_per_token],
            num_rows=tokens * self.bank.rows_per_token,
            num_outputs=tokens * self.bank.outputs_per_token,
            bank=bank,
            hashes_N=pair_N if self.bank.hashed else None,
        )
