"""What a step of a run will send, keep and take at a topology, worked out before a GPU is booked.

Owns the bytes of a whole step by verb, the memory of what a rank keeps between steps, and the seconds that follow from the rates of the
links. The messages of one bank in one micro-step are parallel/volume.py's. Does not read a config (train/dry_run.py does, for
`--dry-run` and benchmarks/scaling.py). Nothing is measured. Imports no torch.

Bytes are means over the ranks, of a step with all its micro-steps. Rings as in parallel/peers.py. Left out: norms, counts and flags, a
few hundred bytes; evaluation and checkpoints.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from model.config import UsedBank
from parallel.volume import BankExchange, Expected, ExpertGroup, Leg, token_bytes, weight_bytes

FLOAT_BYTES = 4  # weights, gradients, moments and statistics are float32 in every run
ALIGNMENT = 2  # DeepSpeed pads what ZeRO splits to a multiple of 2 numbers for each rank
BUCKET_NUMBERS = (
    500_000_000  # DeepSpeed's reduce_bucket_size, which it allocates whole for every backward pass at stages 1 and 2
)
# the ledger's verbs, and its `reduce` and `gather` of the layer "optimizer"
EXCHANGE = ("plan", "dispatch", "gates", "reply", "combine", "weights", "gather", "statistics")
DENSE_GRADIENTS, EXPERT_GRADIENTS, ZERO_GATHER = "gradients (dense)", "gradients (experts)", "ZeRO's gather"
VERBS = (*EXCHANGE, DENSE_GRADIENTS, EXPERT_GRADIENTS, ZERO_GATHER)


@dataclass(frozen=True)
class Topology:
    """processes: all ranks. ep_size of them share one set of experts; node_size of them have fast links between them."""

    processes: int
    ep_size: int
    node_size: int

    @property
    def data_size(self) -> int:
        """Ranks that hold the same experts."""
        return self.processes // self.ep_size

    @property
    def num_hops(self) -> int:
        """Of a row to its experts."""
        return 1 if self.ep_size <= self.node_size else 2

    @property
    def group(self) -> ExpertGroup:
        return ExpertGroup(self.ep_size, self.node_size)


@dataclass(frozen=True)
class Hardware:
    """Rates that are taken as reached, not peaks: GB/s (10^9 bytes) that a rank sends, inside its node and out of it; TFLOP/s of a rank.

    The defaults are an H100's: NVLink 450 each way, a 400 Gb/s network card for each GPU, 300 of its 989 TFLOP/s.
    """

    nvlink_gb: float = 450.0
    network_gb: float = 50.0
    tflops: float = 300.0

    def seconds(self, sent: Expected) -> float:
        """One link after the other."""
        return sent.near / (self.nvlink_gb * 1e9) + sent.far / (self.network_gb * 1e9)


@dataclass(frozen=True)
class Reduction:
    """An all-reduce over all ranks that a layer asks for: so many float32 numbers, `times` in a micro-step's forward pass.

    backward: its gradient travels too. in_layer: recompute repeats it.
    """

    numbers: int
    times: int
    backward: bool
    in_layer: bool


@dataclass(frozen=True)
class Work:
    """What the ranks do in a step. tokens: of the row, per rank and micro-step. wire_bytes: of an element that travels.

    macs_per_token: of a forward pass, None where a layer does not tell its cost. exchanges: by path of the bank. average_keys: labels
    of the banks whose groups' averages are gathered as well (Avg-K). ends_block: labels of the banks whose `combine` is the last thing
    in a block: recompute stops before the last part of it.
    """

    tokens: int
    accumulation_steps: int
    wire_bytes: int
    chunks: int
    recompute: bool
    macs_per_token: float | None
    banks: Sequence[UsedBank] = ()
    exchanges: Mapping[str, BankExchange] = field(default_factory=dict)
    reductions: Sequence[Reduction] = ()
    average_keys: frozenset[str] = frozenset()
    ends_block: frozenset[str] = frozenset()


@dataclass(frozen=True)
class State:
    """What the optimizer keeps. dense, experts: weights of this rank, by group of the optimizer; experts are those of split banks.

    moments: numbers beside each weight, 2 for AdamW and 0 for SGD.
    """

    dense: Sequence[int]
    experts: Sequence[int]
    zero_stage: int
    moments: int


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank at the end of a step's last backward pass, but for activations, which are not predicted.

    bucket: in which DeepSpeed collects gradients before it sums them. gathered: weights of other ranks, while they are needed.
    """

    weights: float
    gradients: float
    master: float
    moments: float
    bucket: float
    gathered: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.master + self.moments + self.bucket + self.gathered


@dataclass(frozen=True)
class Seconds:
    """Of a step. exchange: what waits between layers; reduction: gradients and weights at its end. compute: None if not known."""

    by_verb: dict[str, float]
    compute: float | None

    @property
    def exchange(self) -> float:
        return sum(self.by_verb[verb] for verb in EXCHANGE)

    @property
    def reduction(self) -> float:
        return sum(self.by_verb.values()) - self.exchange

    @property
    def without_overlap(self) -> float:
        return (self.compute or 0.0) + self.exchange + self.reduction

    @property
    def with_overlap(self) -> float:
        """The exchange wholly under compute or compute under it; DeepSpeed's part is not overlapped in either."""
        return max(self.compute or 0.0, self.exchange) + self.reduction


@dataclass(frozen=True)
class Prediction:
    """Of a rank and step. flops: None where a layer does not tell its cost."""

    sent: dict[str, Expected]
    memory: Memory
    flops: float | None

    def seconds(self, hardware: Hardware) -> Seconds:
        compute = None if self.flops is None else self.flops / (hardware.tflops * 1e12)
        return Seconds({verb: hardware.seconds(sent) for verb, sent in self.sent.items()}, compute)


def predict(topology: Topology, work: Work, state: State) -> Prediction:
    """A step of `work` at `topology`."""
    sent: dict[str, Expected] = dict.fromkeys(VERBS, Expected())
    for verb, more in (*_of_banks(topology, work), *_of_optimizer(topology, state, work.accumulation_steps)):
        sent[verb] = Expected(sent[verb].near + more.near, sent[verb].far + more.far)
    flops = None
    if work.macs_per_token is not None:
        # a multiply-accumulate is two; backward is two forwards, and recompute one more
        passes = 4 if work.recompute else 3
        flops = 2.0 * passes * work.macs_per_token * work.tokens * work.accumulation_steps
    return Prediction(sent, _memory(topology, work, state), flops)


def all_reduce(topology: Topology, num_bytes: float, *, stride: int = 1) -> Expected:
    """Of every `stride`-th rank, a ring in rank order: 2 (P - 1) / P of the bytes, to the next rank."""
    return _to_next(topology, 2.0, num_bytes, stride)


def all_gather(topology: Topology, num_bytes: float, *, stride: int = 1) -> Expected:
    """`num_bytes`: what each rank has in the end. (P - 1) / P of them are sent, to the next rank."""
    return _to_next(topology, 1.0, num_bytes, stride)


def local_numel(bank: UsedBank, *, ep_size: int, columns: int) -> int:
    """Weights of a split bank on each rank, padding included."""
    return math.ceil(bank.shape.num_groups / (ep_size // columns)) * bank.shape.group_numel // columns


def _of_banks(topology: Topology, work: Work) -> list[tuple[str, Expected]]:
    """The exchange of all banks and the statistics, by verb."""
    found = []
    for bank in work.banks if topology.ep_size > 1 else ():
        for leg, sent in _legs(bank, topology, work):
            verb = "plan" if leg.name in ("counts", "metadata") else leg.name
            passes = 1.0
            if work.recompute and not leg.backward:
                unrepeated = leg.name == "combine" and bank.shape.label in work.ends_block
                passes = 2.0 - (1 / work.chunks if unrepeated else 0.0)
            found.append((verb, _times(sent, passes * len(bank.uses) * work.accumulation_steps)))
    for one in work.reductions:
        passes = 1 + one.backward + (work.recompute and one.in_layer)
        sent = all_reduce(topology, one.numbers * FLOAT_BYTES)
        found.append(("statistics", _times(sent, passes * one.times * work.accumulation_steps)))
    return found


def _legs(bank: UsedBank, topology: Topology, work: Work) -> list[tuple[Leg, Expected]]:
    chosen, group, wire_bytes = work.exchanges[bank.path], topology.group, work.wire_bytes
    if chosen.mode == "weights":
        legs = weight_bytes(bank.shape, group, wire_bytes=wire_bytes)
    else:
        settings = {"tokens": work.tokens, "columns": chosen.columns, "chunks": work.chunks}
        legs = token_bytes(bank.shape, group, wire_bytes=wire_bytes, **settings)
    found = list(legs.items())
    if bank.shape.label in work.average_keys:
        rows = weight_bytes(replace(bank.shape, group_numel=bank.shape.row_dim), group, wire_bytes=FLOAT_BYTES)
        found += [(Leg("gather", leg.backward), sent) for leg, sent in rows.items()]
    return found


def _of_optimizer(topology: Topology, state: State, accumulation_steps: int) -> list[tuple[str, Expected]]:
    """DeepSpeed's: an all-reduce of the gradients at every stage (stage 2 after each micro-step), and ZeRO's gather of new weights."""
    times = accumulation_steps if state.zero_stage == 2 else 1
    dense, experts = sum(state.dense) * FLOAT_BYTES, sum(state.experts) * FLOAT_BYTES
    found = [
        (DENSE_GRADIENTS, _times(all_reduce(topology, dense), times)),
        (EXPERT_GRADIENTS, _times(all_reduce(topology, experts, stride=topology.ep_size), times)),
    ]
    for sizes, stride in ((state.dense, 1), (state.experts, topology.ep_size)):
        split = sum(_padded(numel, topology.processes // stride) for numel in sizes) if state.zero_stage else 0
        found.append((ZERO_GATHER, all_gather(topology, split * FLOAT_BYTES, stride=stride)))
    return found


def _memory(topology: Topology, work: Work, state: State) -> Memory:
    whole = (sum(state.dense) + sum(state.experts)) * FLOAT_BYTES
    part = FLOAT_BYTES * sum(
        _padded(numel, size) / size
        for sizes, size in ((state.dense, topology.processes), (state.experts, topology.data_size))
        for numel in sizes
    )
    return Memory(
        weights=whole,
        gradients=part if state.zero_stage == 2 else whole,
        master=part if state.zero_stage else 0.0,
        moments=state.moments * (part if state.zero_stage else whole),
        bucket=BUCKET_NUMBERS * FLOAT_BYTES if state.zero_stage else 0.0,
        gathered=_gathered(topology, work),
    )


def _gathered(topology: Topology, work: Work) -> float:
    """Bytes of banks that are gathered to compute with: kept from forward to backward, or with recompute of one block at a time."""
    blocks: dict[str, float] = {}
    kept = 0.0
    for bank in work.banks if topology.ep_size > 1 else ():
        if work.exchanges[bank.path].mode == "weights":
            size = local_numel(bank, ep_size=topology.ep_size, columns=1) * topology.ep_size * work.wire_bytes
            kept += size * len(bank.uses)
            for block in {use.rpartition(".")[0] for use in bank.uses}:
                blocks[block] = blocks.get(block, 0.0) + size
    largest = max(blocks.values(), default=0.0)
    return largest + (largest if work.recompute else kept)  # and the gradients of one block's, at most


def _padded(numel: int, size: int) -> int:
    return math.ceil(numel / (ALIGNMENT * size)) * ALIGNMENT * size


def _to_next(topology: Topology, rounds: float, num_bytes: float, stride: int) -> Expected:
    size = topology.processes // stride
    sent = rounds * (size - 1) / size * num_bytes
    near = _near_next(topology, stride)
    return Expected(near * sent, (1 - near) * sent)


def _near_next(topology: Topology, stride: int) -> float:
    """The share of the ranks whose next one in the ring, the last one's is the first, is on their node."""
    world, node_size = topology.processes, topology.node_size
    following = ((rank, rank + stride if rank + stride < world else rank % stride) for rank in range(world))
    return sum(rank // node_size == after // node_size for rank, after in following) / world


def _times(sent: Expected, factor: float) -> Expected:
    return Expected(sent.near * factor, sent.far * factor)
