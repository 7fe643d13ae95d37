"""What a run is built from: opened shards, a prepared torch, the network, the world of processes and its engine.

The one place that imports the rest of parallel/, and only when it is needed: with it blocked from import, one process still trains at
zero_stage 0. Called by train/run.py, which owns the order.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data.index import ShardIndex, check_tokenizer
from data.split import TrainSplit, open_heldout, open_train
from model.filling import fill
from model.memory import StreamMemory
from model.parameters import materialize
from model.transformer import Transformer
from parallel.config import ProcessInfo, resolve_meeting_s
from train.backends import Backends, by_layers, choose_backends, excluded, unmeasured_backend
from train.config import Config, Layout
from train.crash import CrashFile
from train.engine import Engine, LocalMesh, PlainEngine, World
from train.identity import in_common
from train.optimizer import build_optimizer, parameter_groups
from train.works import works_of

if TYPE_CHECKING:
    from parallel.volume import BankExchange


@dataclass(frozen=True)
class Data:
    """The two splits, opened and checked against each other and the config."""

    train: TrainSplit
    heldout: ShardIndex


def open_data(config: Config) -> Data:
    """Opens both splits; ValueError where they do not fit each other or model.vocab_size."""
    train, heldout = open_train(config.data), open_heldout(config.data)
    check_tokenizer(train.sources[0].index, heldout)
    if config.model.vocab_size not in (None, train.vocab_size):
        raise ValueError(
            f"model.vocab_size must equal the shards', but model.vocab_size is {config.model.vocab_size} and the tokenizer of "
            f"{config.data.sources[0].shards} has {train.vocab_size} tokens: set model.vocab_size to null, or prepare other shards"
        )
    return Data(train, heldout)


def check_same_data(world: World, data: Data) -> None:
    """Every rank opened its own files: they must be the same, or the ranks would see other rows, or other numbers of them.

    Raises RuntimeError, on every rank alike, that names the first rank that differs from rank 0. One all-gather of 200 bytes a rank.
    """
    told = world.all_gather_object([data.train.fingerprint, data.heldout.fingerprint])
    for key, part in (("data.shards", 0), ("data.heldout", 1)):
        for rank, found in enumerate(told):
            if found[part] != told[0][part]:
                raise RuntimeError(
                    f"{key} must hold the same shards for every process, but the fingerprint of rank {rank} is {found[part]} and that "
                    f"of rank 0 is {told[0][part]}: copy the shards to rank {rank}'s node again, or put them where all nodes see them"
                )


def set_up_torch(config: Config, info: ProcessInfo) -> torch.device:
    """Device, threads and determinism of this process: with the same of all three, a run repeats its losses bit for bit."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    torch.use_deterministic_algorithms(True)
    # a debugging aid that costs a pass over every new tensor
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // info.local_world_size))
    if config.run.device != "cuda":  # launcher/environment.py has turned auto into what the machine has
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if visible > 1 and info.local_rank >= visible:
        raise ValueError(
            f"each process needs a GPU of its own, but local rank {info.local_rank} finds {visible} GPUs: start at most {visible} "
            "processes on this machine"
        )
    index = info.local_rank if visible > 1 else 0  # SLURM may show each task only its own
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def exchange_notes(config: Config, layout: Layout, *, processes: int) -> list[str]:
    """Sentences for the log: what travels for each bank and why, equal ones of several layers once."""
    if layout.ep_size == 1:
        return []
    chosen = choose_exchanges(config, layout, processes=processes)
    return [exchange.sentence(path) for exchange, path in by_layers(chosen)]


def build_model(config: Config, *, vocab_size: int) -> Transformer:
    """The network on the meta device: shapes and names, no values."""
    return Transformer(config.model, vocab_size=vocab_size, backend="reference")


def choose_kernels(config: Config, layout: Layout, world: World, model: Transformer) -> tuple[Backends, list[str]]:
    """How the experts and the other parts of the model, not yet narrowed, are computed, and sentences for the log."""
    processes = world.world_size
    exchanges = choose_exchanges(config, layout, processes=processes) if layout.ep_size > 1 else {}
    works = works_of(config, layout, exchanges, model, processes=processes)
    backends = choose_backends(config, works, world)
    return backends, [*excluded(config, works, world.device), *backends.notes()]


def load_model(values: Mapping[str, Tensor], config: Config, *, vocab_size: int, device: torch.device) -> Transformer:
    """The whole network with these weights and states by name, for one process that only reads it."""
    model = build_model(config, vocab_size=vocab_size)
    alone = Layout(ep_size=1, node_size=1)
    works = works_of(config, alone, {}, model, processes=1)
    Backends({path: unmeasured_backend(config, path, work, device) for path, work in works.items()}).apply(model)
    fill(model, values, device=device)
    return model


def build_memory(config: Config, world: World, *, evaluation: bool = False) -> StreamMemory | None:
    """The empty memory of this process's streams, of the training or of one evaluation; None for a model without memory."""
    blocks = config.model.memory_blocks()
    if not blocks:
        return None
    num_streams = config.data.streams
    if evaluation:
        blocks = {depth: config.eval.memory_blocks or number for depth, number in blocks.items()}
        num_streams = config.data.global_batch_size // config.optim.accumulation_steps
    return StreamMemory(
        blocks,
        row_length=config.data.sequence_length,
        d_model=config.model.d_model,
        num_streams=num_streams,
        rank=world.rank,
        num_ranks=world.world_size,
        device=world.device,
    )


def choose_exchanges(config: Config, layout: Layout, *, processes: int) -> "dict[str, BankExchange]":
    """What travels, rows or weights, for each bank by its path in the model: by the shapes of a training micro-step."""
    from parallel.volume import ExpertGroup, choose_exchange

    micro_rows = config.data.global_batch_size // config.optim.accumulation_steps
    return {
        bank.path: choose_exchange(
            bank.shape,
            ExpertGroup(layout.ep_size, layout.node_size),
            tokens=micro_rows // processes * config.data.sequence_length,
            wire_bytes=getattr(torch, config.run.dtype).itemsize,
            chunks=config.parallel.chunks,
            exchange=config.parallel.exchange,
            table_columns=config.parallel.table_columns,
        )
        for bank in config.model.banks()
    }


@contextlib.contextmanager
def open_world(
    config: Config, info: ProcessInfo, layout: Layout, *, device: torch.device, crash: CrashFile
) -> Iterator[tuple[World, Callable[[Transformer], Engine]]]:
    """Joins the processes; gives the world and what makes an engine of a model that is still on the meta device.

    crash: hears of the error that ends the job.
    """
    settings = {
        "clip_grad_norm": config.optim.clip_grad_norm,
        "accumulation_steps": config.optim.accumulation_steps,
        "dtype": getattr(torch, config.run.dtype),
    }

    def plain_engine(model: Transformer) -> Engine:
        materialize(model, seed=config.run.seed, device=device)
        groups = parameter_groups(model, weight_decay=config.optim.weight_decay)
        return PlainEngine(model, build_optimizer(groups, config.optim), **settings)

    if info.world_size == 1 and config.parallel.zero_stage == 0:
        with crash.watched():
            yield LocalMesh(device), plain_engine
        return

    from parallel.limit import ended_after
    from parallel.mesh import open_mesh
    from parallel.parallelize import parallelize
    from parallel.watchdog import watch
    from parallel.zero import ZeroEngine

    watchdog_s = config.parallel.watchdog_s
    # torch's own patience is the longer one: the watchdog names what torch would only call a timeout
    timeout_s, meeting_s = max(600.0, 2 * watchdog_s), resolve_meeting_s(config.parallel.meeting_s, info)
    patience = {"timeout_s": timeout_s, "meeting_s": meeting_s}
    start = contextlib.ExitStack()
    # twice meeting_s: for rank 0 to come, then for the last; timeout_s: for the groups, of which torch itself would tell
    start.enter_context(ended_after(2 * meeting_s + timeout_s, info))
    with (
        start,
        open_mesh(
            info, ep_size=layout.ep_size, node_size=layout.node_size, device=device, **patience, run=in_common(config)
        ) as mesh,
        crash.watched(),
        watch(mesh, timeout_s=watchdog_s, folder=Path(config.run.dir) / "hang", on_hang=crash.hang),
        contextlib.ExitStack() as engines,
    ):
        start.close()  # from here on the watchdog looks

        def zero_engine(model: Transformer) -> Engine:
            chosen = choose_exchanges(config, layout, processes=info.world_size)
            parallelize(model, mesh, seed=config.run.seed, exchanges=chosen, chunks=config.parallel.chunks)
            groups = parameter_groups(model, weight_decay=config.optim.weight_decay)
            stage = config.parallel.zero_stage
            engine = ZeroEngine(
                model, groups, lambda split: build_optimizer(split, config.optim), mesh=mesh, stage=stage, **settings
            )
            engines.callback(engine.close)
            if config.parallel.placement_every_steps is not None:
                engine.placement.count()
            return engine

        yield mesh, zero_engine
