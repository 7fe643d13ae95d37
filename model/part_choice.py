"""How the parts of a network that are no banks of matrices are computed: tables, their choice, top-k attention, shift mixing.

Owns: which parts a model has, the candidates of each, and the work by which they are compared, on random values of the run's sizes. Does
not own: the clock (work.py), when it is used, what is kept and logged (train/backends.py).

Shape letters: B rows, S positions, T = B*S tokens, D model width, H heads, K picks, C copies, L rows of a table.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from kernels import product_key_topk, shift_mix, top_k_attention
from kernels.embedding_bag import embedding_bag
from kernels.peer_experts import peer_experts, peer_products
from kernels.tables.routes import LARGE_TABLE, TableRoutes, candidates
from model.attend import Attend
from model.attention_config import DEFAULT_CHUNK
from model.context import BatchContext
from model.hsm.layer import HSM
from model.peer import PEER
from model.pkm import PKM
from model.section import BankShape
from model.top_k_attention import AttentionDropout
from model.transformer import Transformer
from model.work import Exchange, Work

Compute = Callable[[str], Tensor]  # by the name of a backend


@dataclass(frozen=True)
class Sizes:
    """What a rank works on in a micro-step. dtype: of the products; weights are float32. documents: nobody looks beyond his own; each
    row of a measurement is one.
    """

    rows: int
    length: int
    dtype: torch.dtype
    documents: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def zeros(self, device: torch.device) -> Tensor | None:
        """Of each position the id of its document, or where that begins; None where that does not matter."""
        return torch.zeros(self.rows, self.length, dtype=torch.int64, device=device) if self.documents else None

    def context(self, device: torch.device) -> BatchContext:
        """Of rows at position 0, for what is dropped."""
        return BatchContext(torch.zeros(self.rows, dtype=torch.int64, device=device), None, 0, 0)


@dataclass(frozen=True)
class PartWork(Work):
    """name: all that the time depends on. serving: by device type, the backends that can. build: on a device, the tensors that get
    gradients and what computes."""

    name: str
    serving: Callable[[str], Sequence[str]]
    dtype: torch.dtype
    build: Callable[[torch.device], tuple[list[Tensor], Compute]]

    def __str__(self) -> str:
        return self.name

    def candidates(self, device_type: str) -> Sequence[str]:
        return self.serving(device_type)

    def work(self, backend: str, *, device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
        leaves, compute = self.build(device)

        def work() -> tuple[Tensor, ...]:
            with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
                output = compute(backend)
            return output, *torch.autograd.grad(output, leaves, torch.ones_like(output))

        return work


def part_works(model: Transformer, sizes: Sizes) -> dict[str, PartWork]:
    """By path, every module of the model that has such a choice; tables apart, whose rows may be elsewhere (`table_work`)."""
    works = {}
    for path, module in model.named_modules():
        if isinstance(module, HSM) and module.factors is not None:
            works[path] = _shift_work(module, module.factors, sizes, d_model=model.config.d_model)
        elif isinstance(module, (PEER, PKM)):
            works[f"{path}.router"] = _choice_work(module, sizes)
        elif isinstance(module, Attend) and module.selects():
            works[path] = _attention_work(module, sizes)
    return works


def table_work(
    bank: BankShape, sizes: Sizes, *, num_rows: int, activation: str, ranges: int = 1, columns: int = 1,
    exchange: Exchange | None = None,
) -> PartWork:  # fmt: skip
    """What is looked up in a table of which this rank computes with `num_rows` rows and one of `columns` ranges of columns.

    activation: of its neurons, if it has some. ranges: of rows, over which the ranks share the table. A token goes to every range that
    it chose of, and there to all columns.
    """
    num_rows, width = min(num_rows, LARGE_TABLE), bank.output_dim // columns
    choices = bank.num_heads * bank.top_k
    arriving = round(sizes.tokens * columns * ranges * (1 - (1 - 1 / ranges) ** choices))  # choices fall where they may
    num_copies = sizes.tokens * columns * choices
    kind = "values" if not bank.replies else "neurons" if columns == 1 else "products"
    reads = f"{arriving} rows read {num_copies}"
    of = f" of {activation}" * (kind == "neurons")
    name = f"table of {num_rows} {kind}{of} x {width}: {reads}, {sizes.dtype}, {exchange or 'nothing'} sent"
    row_dtype = sizes.dtype if exchange == "tokens" else torch.float32
    table_dtype = sizes.dtype if exchange == "weights" else torch.float32

    def build(device: torch.device) -> tuple[list[Tensor], Compute]:
        normal, generator = _normal(device)
        rows_C = torch.arange(num_copies, device=device) * arriving // num_copies
        entry_C = torch.randint(num_rows, rows_C.shape, generator=generator, device=device)
        routes = TableRoutes.of(entry_C, rows_C, rows_C, num_rows=arriving, num_outputs=arriving)
        rows, gates = normal(arriving, width).to(row_dtype), normal(num_copies).sigmoid()
        up, down = (normal(num_rows, width).to(table_dtype) for _ in range(2))
        if kind == "values":
            return _leaves(down, gates), lambda backend: embedding_bag(down, gates, routes=routes, backend=backend)
        if kind == "neurons":
            neurons = partial(peer_experts, rows, up, down, gates, routes=routes, activation=activation)
            return _leaves(rows, up, down, gates), lambda backend: neurons(backend=backend)

        def in_halves(backend: str) -> Tensor:
            weights = gates * peer_products(rows, up, routes=routes, backend=backend)
            return embedding_bag(down, weights, routes=routes, backend=backend)

        return _leaves(rows, up, down, gates), in_halves

    return PartWork(name, candidates, sizes.dtype, build)


def _choice_work(layer: PEER | PKM, sizes: Sizes) -> PartWork:
    router, top_k = layer.router, layer.config.top_k
    assert top_k is not None
    key_sets, _, num_keys, half = router.keys.shape
    # a query that all heads have is kept once where each has its own sub-keys: see ProductKeys.choose
    num_queries = 1 if router.query is None and key_sets > 1 else router.num_heads
    keys_of = f"{key_sets} set{'s' * (key_sets > 1)} of {num_keys} sub-keys of 2 x {half}"
    of_query = " by one query" * (num_queries < router.num_heads)
    name = f"{router.num_heads} x {top_k} of {num_keys}^2 by {keys_of}{of_query}: {sizes.tokens} tokens"

    def build(device: torch.device) -> tuple[list[Tensor], Compute]:
        normal, _ = _normal(device)
        queries = normal(sizes.tokens, num_queries, 2, half)
        keys = normal(*router.keys.shape)
        choose = partial(product_key_topk.product_key_topk, queries, keys, top_k=top_k)
        return _leaves(queries, keys), lambda backend: choose(backend=backend).scores_THK

    return PartWork(name, partial(product_key_topk.candidates, num_keys=num_keys, top_k=top_k), sizes.dtype, build)


def _attention_work(attend: Attend, sizes: Sizes) -> PartWork:
    config, length = attend.config, sizes.length
    heads, kv_heads, width = config.num_heads, config.kv_heads(), config.head_dim
    num_keys = length * (1 + config.memory_blocks)
    positions = attend.relative is not None
    extras = positions or config.attention_dropout > 0
    best = "all" if config.attend_top_k is None else f"the best {config.attend_top_k}"
    keys = f"{num_keys} keys{f' of {kv_heads} heads' * (kv_heads < heads)}"
    of_keys = f"{best} of {keys}{' by distance too' * positions}{', dropout' * (config.attention_dropout > 0)}"
    chunk = config.attend_chunk or DEFAULT_CHUNK
    queries = f"{sizes.rows} x {heads} x {length} queries of {width}, {chunk} at once,"
    name = f"attention of {queries} to {of_keys}, {sizes.dtype}{', documents' * sizes.documents}"

    def build(device: torch.device) -> tuple[list[Tensor], Compute]:
        normal, _ = _normal(device)
        shapes = [(heads, length), (kv_heads, num_keys), (kv_heads, num_keys), *[(heads, length)] * positions]
        q, k, v, *by_distance = (normal(sizes.rows, *shape, width).to(sizes.dtype) for shape in shapes)
        by_distance += [normal(heads, num_keys, width).to(sizes.dtype)] * positions
        leaves = _leaves(q, k, v, *by_distance)
        drop = AttentionDropout(sizes.context(device), config.attention_dropout)
        attention = partial(
            top_k_attention.top_k_attention,
            *leaves[:3],
            top_k=config.attend_top_k,
            scale=1.0 if positions else width**-0.5,
            first_BS=replace(sizes, documents=sizes.documents or config.memory_blocks > 0).zeros(device),
            chunk=chunk,
            relative=tuple(by_distance) if positions else None,
            drop=drop if config.attention_dropout else None,
        )
        return leaves, lambda backend: attention(backend=backend)

    serving = partial(
        top_k_attention.candidates, top_k=config.attend_top_k, num_keys=num_keys, widths=(width, width), extras=extras
    )
    return PartWork(name, serving, sizes.dtype, build)


def _shift_work(layer: HSM, factors: tuple[Tensor, Tensor], sizes: Sizes, *, d_model: int) -> PartWork:
    num_factors, shifts = len(factors[0]), layer.shifts
    shape = f"{sizes.rows} x {sizes.length} positions of {d_model}{', documents' * sizes.documents}"
    name = (
        f"shift mixing by {', '.join(map(str, shifts))} with {num_factors} factors, before it {layer.boundary}: {shape}"
    )

    def build(device: torch.device) -> tuple[list[Tensor], Compute]:
        normal, _ = _normal(device)
        u = normal(sizes.rows, sizes.length, d_model)
        a, b = normal(num_factors), normal(num_factors)
        options = {"shifts": shifts, "boundary": layer.boundary, "document_ids_BS": sizes.zeros(device)}
        mix = partial(shift_mix.shift_mix, u, a, b, **options)
        return _leaves(u, a, b), lambda backend: mix(backend=backend)

    return PartWork(name, shift_mix.candidates, sizes.dtype, build)


def _normal(device: torch.device) -> tuple[Callable[..., Tensor], torch.Generator]:
    generator = torch.Generator(device).manual_seed(0)
    return partial(torch.randn, generator=generator, device=device), generator


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.requires_grad_() for tensor in tensors]
