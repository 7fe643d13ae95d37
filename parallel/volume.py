"""The bytes of the exchange as formulas, and what `exchange: auto` makes of them for each bank.

Owns the expected bytes that a rank sends in a micro-step, by leg, and the choice between tokens and weights and of a table's columns.
Does not own what is sent (parallel/expert.py) nor its count (parallel/ledger.py). Called when a run starts, by `--dry-run` and by
benchmarks/scaling.py; imports no torch.

Tokens are expected under uniform routing: each head of a token chooses `top_k` distinct groups, all sets alike. The expectation is exact,
padding included. docs/parallelism.md has the formulas as a table. Bytes are those of one forward and one backward pass, means over the
ranks; what activation recompute repeats is parallel/predict.py's. What stays on a rank is not sent.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from model.section import BankShape

Mode = Literal["tokens", "weights"]

COUNTS_BYTES = 24  # rows, output rows and copies as int64, to each other rank
WORD_BYTES = 4  # int32: group ids, output rows, copies of a row
HASH_BYTES = 8
NUMBER_BYTES = 4  # float32: gates, partial products, and their gradients
SEGMENT_BYTES = 32  # a sector of GPU memory, the least that is read (specs of arXiv 2407.04153, section 3.3)


@dataclass(frozen=True)
class Leg:
    """A kind of message: the ledger's verb, but that its `plan` is two, counts and metadata. backward: it carries gradients."""

    name: str
    backward: bool = False


@dataclass(frozen=True)
class Expected:
    """Expected bytes that leave a rank: to ranks on its own node, and to ranks on others."""

    near: float = 0.0
    far: float = 0.0

    @property
    def total(self) -> float:
        return self.near + self.far


@dataclass(frozen=True)
class HopLoad:
    """What a rank sends to others in one hop: to how many of them, and the rows, output rows and copies of all, each once per receiver."""

    peers: float = 0.0
    rows: float = 0.0
    outputs: float = 0.0
    copies: float = 0.0

    def plus(self, other: "HopLoad", factor: float) -> "HopLoad":
        """With `factor` times the rows, output rows and copies of another."""
        rows, outputs = self.rows + factor * other.rows, self.outputs + factor * other.outputs
        return HopLoad(self.peers, rows, outputs, self.copies + factor * other.copies)


@dataclass(frozen=True)
class ExpertGroup:
    """ep_size consecutive ranks of a world that is cut into nodes of node_size. Larger than a node, it is made of whole nodes."""

    ep_size: int
    node_size: int

    def near_peers(self) -> list[float]:
        """By rank of the group, how many others are on its node: a mean over groups, which may lie differently on the nodes."""
        nodes = [[rank // self.node_size for rank in ranks] for ranks in self._groups()]
        counts = [(Counter(of_group), of_group) for of_group in nodes]
        return [sum(count[of[rank]] - 1 for count, of in counts) / len(nodes) for rank in range(self.ep_size)]

    def near_next(self) -> float:
        """The share of the ranks whose next one in a ring round the group is on their node."""
        pairs = [pair for ranks in self._groups() for pair in zip(ranks, [*ranks[1:], ranks[0]], strict=True)]
        return sum(one // self.node_size == after // self.node_size for one, after in pairs) / len(pairs)

    def _groups(self) -> list[range]:
        """The groups up to where they lie on the nodes as before."""
        world = math.lcm(self.ep_size, self.node_size)
        return [range(first, first + self.ep_size) for first in range(0, world, self.ep_size)]


@dataclass(frozen=True)
class BankExchange:
    """What was chosen for a bank. columns: ranks that share a table's width, 1 for other banks and with weights.

    tokens_bytes, weights_bytes: of either mode, per micro-step and rank, forward and backward, to other ranks.
    """

    mode: Mode
    columns: int
    tokens_bytes: float
    weights_bytes: float

    def sentence(self, path: str) -> str:
        """For the log, with both numbers. path: of the bank in the model."""
        tokens, weights = _readable(self.tokens_bytes), _readable(self.weights_bytes)
        if self.mode == "weights":
            return f"{path}: weights, {weights} per micro-step and rank against {tokens} of tokens"
        columns = f" in {self.columns} columns" if self.columns > 1 else ""
        return f"{path}: tokens{columns}, {tokens} per micro-step and rank against {weights} of weights"


def choose_exchange(
    bank: BankShape,
    group: ExpertGroup,
    *,
    tokens: int,
    wire_bytes: int,
    chunks: int = 1,
    exchange: Literal["auto", "tokens", "weights"] = "auto",
    table_columns: int | Literal["auto"] = "auto",
) -> BankExchange:
    """The mode with fewer bytes, and the number of columns of a table with fewest, unless the settings of the section say which.

    tokens: of the row, per rank in a training micro-step, so that evaluation does not choose again. wire_bytes: of an element that
    travels, 2 under autocast. A number of columns above 1 is kept by sending tokens.
    """
    setting = table_columns if bank.is_table else 1
    candidates = _columns(bank, group, wire_bytes) if setting == "auto" else [setting]
    by_columns = {
        columns: total(token_bytes(bank, group, tokens=tokens, wire_bytes=wire_bytes, columns=columns, chunks=chunks))
        for columns in candidates
    }
    columns = min(by_columns, key=by_columns.__getitem__)
    of_tokens, of_weights = by_columns[columns], total(weight_bytes(bank, group, wire_bytes=wire_bytes))
    if exchange == "auto":
        exchange = "weights" if of_weights < of_tokens and setting in (1, "auto") else "tokens"
    return BankExchange(exchange, columns if exchange == "tokens" else 1, of_tokens, of_weights)


def token_bytes(
    bank: BankShape, group: ExpertGroup, *, tokens: int, wire_bytes: int, columns: int = 1, chunks: int = 1
) -> dict[Leg, Expected]:
    """Expected bytes by leg where rows travel: in one hop, or in two (across, then inside) where the group is larger than a node.

    columns divide ep_size and the bank's widths. chunks: parts of the exchange; a token whose entries lie in two travels twice.
    """
    loads = _two_hops if group.ep_size > group.node_size else _one_hop
    near, far = loads(bank, group, tokens=tokens, columns=columns, chunks=chunks)
    near, far = (hop_bytes(bank, load, wire_bytes=wire_bytes, columns=columns, chunks=chunks) for load in (near, far))
    return {leg: Expected(near[leg], far[leg]) for leg in near}


def weight_bytes(bank: BankShape, group: ExpertGroup, *, wire_bytes: int) -> dict[Leg, Expected]:
    """Bytes where the bank is gathered instead: L groups of each rank, padding among them, to all; back the gradients of theirs.

    Forward a ring, in which a rank passes what it has to the next one; backward each gradient goes straight to its owner.
    """
    others, near_peers, near_next = group.ep_size - 1, sum(group.near_peers()) / group.ep_size, group.near_next()
    each = math.ceil(bank.num_groups / group.ep_size) * bank.group_numel * wire_bytes
    return {
        Leg("weights"): Expected(near_next * others * each, (1 - near_next) * others * each),
        Leg("weights", backward=True): Expected(near_peers * each, (others - near_peers) * each),
    }


def hop_bytes(bank: BankShape, load: HopLoad, *, wire_bytes: int, columns: int, chunks: int) -> dict[Leg, float]:
    """Bytes by leg of one hop: the messages, whose counts may be expected or real."""
    words = 1 if bank.same_rows else 2  # of a copy: its group, its output row
    hashes = load.copies * HASH_BYTES * bank.hashed
    planned = {
        Leg("counts"): COUNTS_BYTES * chunks * load.peers,
        Leg("metadata"): WORD_BYTES * (load.rows + load.copies * words) + hashes,
    }
    numbers = load.copies * NUMBER_BYTES
    both_ways = {
        "dispatch": load.rows * bank.row_dim / columns * wire_bytes,
        "reply": numbers if bank.replies and columns > 1 else 0.0,
        "gates": numbers,
        "combine": load.outputs * bank.output_dim / columns * wire_bytes,
    }
    return planned | {Leg(name, back): size for back in (False, True) for name, size in both_ways.items()}


def total(legs: dict[Leg, Expected]) -> float:
    """Bytes of all legs, near and far."""
    return sum(sent.total for sent in legs.values())


def hit_chance(bank: BankShape, *, heads: range, groups: range) -> float:
    """The chance that at least one of `heads` chooses at least one of `groups`: 1 - prod over heads of C(n - m, K) / C(n, K).

    n: groups that the head chooses among; m: those of them in `groups`. Relative precision of a float64 also where it is tiny.
    """
    among = _among(bank, heads, groups)
    return -math.expm1(sum(_log_miss(n, m, bank.top_k) * number for (n, m), number in among.items()))


def _one_hop(bank: BankShape, group: ExpertGroup, *, tokens: int, columns: int, chunks: int) -> tuple[HopLoad, HopLoad]:
    """Near and far where each rank sends straight to each other one."""
    size, all_near_peers = group.ep_size, group.near_peers()
    mean = sum(all_near_peers) / size
    near, far = HopLoad(peers=mean), HopLoad(peers=size - 1 - mean)
    for rank, near_peers in enumerate(all_near_peers):
        reached = _reached(bank, range(rank, rank + 1), size, tokens=tokens, columns=columns, chunks=chunks)
        near = near.plus(reached, near_peers / size)
        far = far.plus(reached, (size - 1 - near_peers) / size)
    return near, far


def _two_hops(
    bank: BankShape, group: ExpertGroup, *, tokens: int, columns: int, chunks: int
) -> tuple[HopLoad, HopLoad]:
    """Far: a row once to each other node. Near: inside each node, the rows of all nodes that came to one of its ranks, to the others."""
    size, node_size = group.ep_size, group.node_size
    num_nodes = size // node_size
    near, far = HopLoad(peers=node_size - 1), HopLoad(peers=num_nodes - 1)
    for rank in range(size):
        reached = _reached(bank, range(rank, rank + 1), size, tokens=tokens, columns=columns, chunks=chunks)
        near = near.plus(reached, 1 - 1 / node_size)
    for first in range(0, size, node_size):
        ranks = range(first, first + node_size)
        reached = _reached(bank, ranks, size, tokens=tokens, columns=columns, chunks=chunks)
        far = far.plus(reached, 1 - 1 / num_nodes)
    return near, far


def _reached(bank: BankShape, ranks: range, ep_size: int, *, tokens: int, columns: int, chunks: int) -> HopLoad:
    """What one rank's tokens send to the experts of `ranks` as if these were one, with a row of its own for each column."""
    num_local = math.ceil(bank.num_groups / (ep_size // columns))
    source_heads = _heads_of_rows(bank, bank.rows_per_token, tokens=tokens, chunks=chunks)
    output_heads = _heads_of_rows(bank, bank.outputs_per_token, tokens=tokens, chunks=chunks)
    reached = HopLoad()
    for column in range(columns):
        # rank = row shard * columns + column; the row shards of a range of ranks with this column are a range too
        first, end = (-((column - rank) // columns) for rank in (ranks.start, ranks.stop))
        groups = range(min(first * num_local, bank.num_groups), min(end * num_local, bank.num_groups))
        if not groups:
            continue
        rows, outputs = (
            sum(number * hit_chance(bank, heads=heads, groups=groups) for heads, number in of.items())
            for of in (source_heads, output_heads)
        )
        shares = sum(m / n * number for (n, m), number in _among(bank, range(bank.num_heads), groups).items())
        copies = tokens * bank.token_factor * bank.top_k * shares
        reached = reached.plus(HopLoad(0.0, rows, outputs, copies), 1.0)
    return reached


def _heads_of_rows(bank: BankShape, rows_per_token: int, *, tokens: int, chunks: int) -> Counter[range]:
    """The rows of all parts together, by the heads that feed them. A token at the end of a part is a row with some of its heads."""
    tokens, heads = tokens * bank.token_factor, bank.num_heads
    if rows_per_token > 1:
        return Counter({range(head, head + 1): tokens for head in range(heads)})
    entries = max(
        bank.rows_per_token, bank.outputs_per_token
    )  # of a token; each has one head, or else the only one has all
    if entries == 1:
        return Counter({range(heads): tokens})
    found: Counter[range] = Counter()
    size = math.ceil(tokens * heads / chunks)
    for start in range(0, tokens * heads, max(1, size)):
        end = min(start + size, tokens * heads)
        (first, skipped), (last, taken) = divmod(start, heads), divmod(end, heads)
        if first == last:
            found[range(skipped, taken)] += 1
            continue
        found[range(skipped, heads)] += 1
        found[range(heads)] += last - first - 1
        found[range(taken)] += 1
    return found


def _among(bank: BankShape, heads: range, groups: range) -> Counter[tuple[int, int]]:
    """How many of `heads` choose among n groups, m of which are in `groups`, by (n, m)."""
    if bank.shares_groups:
        return Counter({(bank.num_groups, len(groups)): len(heads)})
    n = bank.num_groups // bank.num_heads
    return Counter((n, max(0, min(groups.stop, (h + 1) * n) - max(groups.start, h * n))) for h in heads)


def _log_miss(n: int, m: int, k: int) -> float:
    """log of C(n - m, k) / C(n, k): none of m groups is among k distinct ones of n."""
    if n - m < k:
        return -math.inf
    fewer, more = min(k, m), max(k, m)  # the ratio is the same with k and m exchanged
    return sum(math.log1p(-more / (n - i)) for i in range(fewer))


def _columns(bank: BankShape, group: ExpertGroup, wire_bytes: int) -> list[int]:
    """Numbers of columns that divide the ranks and the width and leave segments of at least SEGMENT_BYTES."""
    widest = bank.output_dim * wire_bytes // SEGMENT_BYTES
    return [
        n for n in range(1, group.ep_size + 1) if n == 1 or not (group.ep_size % n or bank.output_dim % n or n > widest)
    ]


def _readable(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
