"""The processes of a run: who they are, which groups they form, and how they agree. The only maker of process groups.

Groups come from megatron.core.parallel_state (expert-parallel ranks are consecutive, expert-data ranks strided); zero.py registers
the same groups with DeepSpeed, so there is one set of communicators. train/ asks the mesh and never torch.distributed. What the mesh
itself sends is in its ledger (parallel/ledger.py), which everything else that communicates is handed.
"""

import contextlib
import json
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, Store

from parallel.config import ProcessInfo, check_nodes
from parallel.ledger import Ledger, Traffic, Where
from parallel.meeting import meet
from parallel.peers import Peers, peers_of
from parallel.traffic import exchange_record

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mesh:
    """This process among all: its place, its device, and the groups every collective of a run uses.

    world: all ranks (data parallel). experts: the ep_size ranks that share one copy of the experts. expert_data: the world_size /
    ep_size ranks that hold the same experts. `*_group` are their communicators. node and rail, where ep_size is above node_size
    (None otherwise): the ranks of the expert group on this node, and those with the same place in their nodes.
    """

    rank: int
    world_size: int
    ep_rank: int
    ep_size: int
    node_size: int
    device: torch.device
    world: Peers
    experts: Peers
    expert_data: Peers
    node: Peers | None
    rail: Peers | None
    ledger: Ledger
    _steps: list[Traffic] = field(default_factory=list)

    @property
    def world_group(self) -> dist.ProcessGroup:
        return self.world.group

    @property
    def expert_group(self) -> dist.ProcessGroup:
        return self.experts.group

    @property
    def expert_data_group(self) -> dist.ProcessGroup:
        return self.expert_data.group

    def begin_step(self, step: int) -> None:
        """Step number `step` (1 is the first) begins. What was sent since the last step (evaluation, checkpoint) is no step's."""
        self.ledger.take()
        self.ledger.step = step

    def end_step(self) -> None:
        """What was sent since `begin_step` belongs to the step."""
        self._steps.append(self.ledger.take())

    def waited(self) -> float:
        """Host seconds that this process has spent in collectives and in waits for them since the mesh was opened."""
        return self.ledger.waited

    def exchange(self) -> dict[str, Any]:
        """What the steps since the last call sent and waited: see parallel/traffic.py. Every rank calls it."""
        traffic, num_steps = sum(self._steps, Traffic()), len(self._steps)
        self._steps.clear()
        return exchange_record(self, traffic, num_steps=num_steps)

    @contextlib.contextmanager
    def beside(self, *, timeout_s: float) -> Iterator["Mesh"]:
        """The same ranks with a gloo group and a ledger of their own: for one other thread, whose collectives never mix with the run's.

        Every rank enters it. What the mesh sends lies in host memory, and no watchdog looks at it: a collective that waits longer than
        `timeout_s` seconds for a rank fails, and then so do all that follow.
        """
        group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        ledger = Ledger()
        world = peers_of(group, node_size=self.node_size, ledger=ledger)
        try:
            yield replace(self, device=torch.device("cpu"), world=world, ledger=ledger, _steps=[])
        finally:
            dist.destroy_process_group(group)

    def barrier(self) -> None:
        """Returns when every rank is here."""
        self._all_reduce(torch.zeros(1), verb="barrier").item()

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks of a tensor of one shape and dtype, on every rank: one all-reduce of its bytes over the world group."""
        return self._all_reduce(values, verb="sum")

    def max(self, values: Tensor) -> Tensor:
        """Like `sum`, but element by element the largest."""
        return self._all_reduce(values, verb="max", op=dist.ReduceOp.MAX)

    def agree(self, flag: bool) -> bool:
        """True on every rank if it is true on any. All-reduce of 4 bytes over the world group."""
        return bool(self._all_reduce(torch.tensor(float(flag)), verb="agree").item() > 0)

    def all_gather_object(self, value: Any) -> list[Any]:
        """The JSON value of every rank, in rank order, on every rank. JSON, because no pickle is decoded anywhere."""
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        lengths = torch.zeros(self.world_size, dtype=torch.int64)
        lengths[self.rank] = mine.numel()
        lengths = self.sum(lengths).tolist()
        texts = [torch.empty(length, dtype=torch.uint8, device=self.device) for length in lengths]
        for source, text in enumerate(texts):  # ragged: one broadcast for each rank, of its own length
            if source == self.rank:
                text.copy_(mine)
            sent = self.world.broadcast(text.numel(), source=source)
            with self.ledger.collective(Where("run", "", "tell"), sent):
                dist.broadcast(text, group_src=source, group=self.world_group)
        with self.ledger.waiting(Where("run", "", "tell")):  # on a GPU the host waits only here
            return [json.loads(bytes(text.cpu().numpy())) for text in texts]

    def _all_reduce(self, values: Tensor, *, verb: str, op: Any = dist.ReduceOp.SUM) -> Tensor:
        total = values.detach().to(self.device, copy=True)
        sent = self.world.all_reduce(total.numel() * total.element_size())
        with self.ledger.collective(Where("run", "", verb), sent):
            dist.all_reduce(total, op=op, group=self.world_group)
            if total.is_cuda:
                torch.cuda.current_stream().synchronize()  # all callers read it at once: let them wait where the watchdog sees it
        return total

    def raise_together(self, error: Exception | None) -> None:
        """Every rank calls it with its own error or None; if any has one, all raise the first failing rank's.

        Raises:
            ValueError: that error is one: the user must change something.
            RuntimeError: that error is any other. The message names the rank where there are several; the cause is the own error.
        """
        if not self.agree(error is not None):
            return
        mine = None if error is None else [str(error) or type(error).__name__, isinstance(error, ValueError)]
        told = self.all_gather_object(mine)
        rank = next(rank for rank, one in enumerate(told) if one is not None)
        sentence, is_of_the_user = told[rank]
        where = f" (rank {rank} of {self.world_size})" if self.world_size > 1 else ""
        raise (ValueError if is_of_the_user else RuntimeError)(sentence + where) from error


@contextlib.contextmanager
def open_mesh(
    info: ProcessInfo,
    *,
    ep_size: int,
    device: torch.device,
    node_size: int | None = None,
    timeout_s: float = 600.0,
    meeting_s: float = 600.0,
    run: Mapping[str, str] | None = None,
) -> Iterator[Mesh]:
    """Joins the processes of the run and leaves them again.

    node_size: processes with fast links between them, consecutive ranks (None: all). A collective that waits longer than `timeout_s`
    seconds for a rank fails with an error instead of waiting for ever (some groups in whole minutes, rounded up). meeting_s: seconds
    that a rank waits for the others to come at all; torchrun has a limit of its own for that. run: what tells it from others, see
    parallel/meeting.py.

    Raises:
        ValueError: ep_size is above node_size and not a multiple of it, or the ranks were given different sizes.
        RuntimeError: a rank did not come in time, names which; or this one belongs to another run than rank 0.
    """
    node_size = node_size or info.world_size
    check_nodes(ep_size=ep_size, node_size=node_size)
    parallel_state = _import_parallel_state()  # seconds: who dies in them is missed at the meeting
    owns_process_group = not dist.is_initialized()
    if owns_process_group:
        place = {"RANK": info.rank, "WORLD_SIZE": info.world_size, "LOCAL_RANK": info.local_rank}
        place |= {"MASTER_ADDR": info.master_addr, "MASTER_PORT": info.master_port}
        os.environ |= {name: str(value) for name, value in place.items()}  # torch and DeepSpeed read them there
        store = _open_store(info, run=run or {}, meeting_s=meeting_s)
        if store is not None:
            store.set_timeout(timedelta(seconds=timeout_s))
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            rank=info.rank,
            world_size=info.world_size,
            timeout=timedelta(seconds=timeout_s),
            store=store,
        )
    try:
        _check_same_sizes({"ep_size": ep_size, "node_size": node_size}, device)
        with (
            _groups(parallel_state, ep_size, timeout_s=timeout_s),
            _node_groups(info, ep_size=ep_size, node_size=node_size, timeout_s=timeout_s) as (node, rail),
        ):
            ledger = Ledger()

            def peers(group: Any) -> Peers:
                return peers_of(group, node_size=node_size, ledger=ledger)

            yield Mesh(
                rank=info.rank,
                world_size=info.world_size,
                ep_rank=parallel_state.get_expert_model_parallel_rank(),
                ep_size=ep_size,
                node_size=node_size,
                device=device,
                world=peers(parallel_state.get_data_parallel_group()),
                experts=peers(parallel_state.get_expert_model_parallel_group()),
                expert_data=peers(parallel_state.get_expert_data_parallel_group()),
                node=None if node is None else peers(node),
                rail=None if rail is None else peers(rail),
                ledger=ledger,
            )
    finally:
        if owns_process_group:
            dist.destroy_process_group()


def _check_same_sizes(sizes: dict[str, int], device: torch.device) -> None:
    """Ranks that want different groups would wait for each other in the making of them. One all-reduce of 32 bytes over all ranks."""
    ends = torch.tensor([[size, -size] for size in sizes.values()], device=device)
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    for name, (most, least) in zip(sizes, ends.tolist(), strict=True):
        if most != -least:
            raise ValueError(
                f"{name} must be the same on all ranks, but it is {-least} on some and {most} on others: start as many processes on each "
                f"node, or set parallel.{name}"
            )


@contextlib.contextmanager
def _node_groups(
    info: ProcessInfo, *, ep_size: int, node_size: int, timeout_s: float
) -> Iterator[tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]]:
    """This rank's two parts of an expert group that spans nodes. Every rank makes every group, in one order."""
    if ep_size <= node_size:
        yield None, None
        return
    rows = [list(range(first, first + node_size)) for first in range(0, info.world_size, node_size)]
    experts = [list(range(first, first + ep_size)) for first in range(0, info.world_size, ep_size)]
    rails = [ranks[place::node_size] for ranks in experts for place in range(node_size)]
    made: dict[str, Any] = {}
    try:
        for kind, groups in (("node", rows), ("rail", rails)):
            for ranks in groups:
                group = dist.new_group(ranks, timeout=timedelta(seconds=timeout_s))
                if info.rank in ranks:
                    made[kind] = group
        yield made["node"], made["rail"]
    finally:
        for group in made.values():  # left alive, each would keep its threads and connections
            dist.destroy_process_group(group)


def _open_store(info: ProcessInfo, *, run: Mapping[str, str], meeting_s: float) -> Store | None:
    """None: torch opens the one that torchrun names."""
    if info.world_size == 1:
        return HashStore()  # needs no port
    return None if "TORCHELASTIC_RUN_ID" in os.environ else meet(info, run=run, within_s=meeting_s)


def _import_parallel_state() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron.core warns four times about optional CUDA packages when imported
        from megatron.core import parallel_state
    return parallel_state


@contextlib.contextmanager
def _groups(parallel_state: Any, ep_size: int, *, timeout_s: float) -> Iterator[None]:
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=ep_size,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=math.ceil(timeout_s / 60),  # megatron's own default is 30 minutes
    )
    try:
        yield
    finally:
        # megatron only forgets its groups; left alive, each would keep its threads and connections
        for group in (parallel_state._global_process_group_list or [])[1:]:
            dist.destroy_process_group(group)
        parallel_state._global_process_group_list = None
        parallel_state.destroy_model_parallel()
        parallel_state._INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP = None  # the one that it does not even forget
