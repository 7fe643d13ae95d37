"""The processes of a run: who they are, which groups they form, and how they agree. The only maker of process groups.

Groups come from megatron.core.parallel_state (expert-parallel ranks are consecutive, expert-data ranks strided); zero.py registers
the same groups with DeepSpeed, so there is one set of communicators. train/ asks the mesh and never torch.distributed.
"""

import contextlib
import json
import logging
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from parallel.config import ProcessInfo

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mesh:
    """This process among all: its place, its device, and the three groups every collective of a run uses.

    world_group: all ranks (data parallel). expert_group: the ep_size ranks that share one copy of the experts. expert_data_group:
    the world_size / ep_size ranks that hold the same experts.
    """

    rank: int
    world_size: int
    ep_rank: int
    ep_size: int
    device: torch.device
    world_group: dist.ProcessGroup
    expert_group: dist.ProcessGroup
    expert_data_group: dist.ProcessGroup

    def barrier(self) -> None:
        """Returns when every rank is here."""
        self.sum(torch.zeros(1)).item()  # the host waits too, also for NCCL

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks of a tensor of one shape and dtype, on every rank: one all-reduce of its bytes over the world group."""
        total = values.detach().to(self.device, copy=True)
        dist.all_reduce(total, group=self.world_group)
        return total

    def agree(self, flag: bool) -> bool:
        """True on every rank if it is true on any. All-reduce of 4 bytes over the world group."""
        return bool(self.sum(torch.tensor(float(flag))).item() > 0)

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
            dist.broadcast(text, group_src=source, group=self.world_group)
        return [json.loads(bytes(text.cpu().numpy())) for text in texts]

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
def open_mesh(info: ProcessInfo, *, ep_size: int, device: torch.device, timeout_s: float = 600.0) -> Iterator[Mesh]:
    """Joins the processes of the run and leaves them again.

    A collective that waits longer than `timeout_s` seconds for a rank fails with an error instead of waiting for ever (in whole
    minutes, rounded up).
    """
    owns_process_group = not dist.is_initialized()
    if owns_process_group:
        place = {"RANK": info.rank, "WORLD_SIZE": info.world_size, "LOCAL_RANK": info.local_rank}
        place |= {"MASTER_ADDR": info.master_addr, "MASTER_PORT": info.master_port}
        os.environ |= {name: str(value) for name, value in place.items()}  # torch and DeepSpeed read them there
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            rank=info.rank,
            world_size=info.world_size,
            timeout=timedelta(seconds=timeout_s),
            store=HashStore() if info.world_size == 1 else None,  # one process needs no port
        )
    try:
        with _groups(ep_size, timeout_s=timeout_s) as parallel_state:
            yield Mesh(
                rank=info.rank,
                world_size=info.world_size,
                ep_rank=parallel_state.get_expert_model_parallel_rank(),
                ep_size=ep_size,
                device=device,
                world_group=parallel_state.get_data_parallel_group(),
                expert_group=parallel_state.get_expert_model_parallel_group(),
                expert_data_group=parallel_state.get_expert_data_parallel_group(),
            )
    finally:
        if owns_process_group:
            dist.destroy_process_group()


@contextlib.contextmanager
def _groups(ep_size: int, *, timeout_s: float) -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron.core warns four times about optional CUDA packages when imported
        from megatron.core import parallel_state
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=ep_size,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=math.ceil(timeout_s / 60),  # megatron's own default is 30 minutes
    )
    try:
        yield parallel_state
    finally:
        # megatron only forgets its groups; left alive, each would keep its threads and connections
        for group in (parallel_state._global_process_group_list or [])[1:]:
            dist.destroy_process_group(group)
        parallel_state._global_process_group_list = None
        parallel_state.destroy_model_parallel()
