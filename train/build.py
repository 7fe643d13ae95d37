"""What a run is built from: opened shards, a prepared torch, the network, the world of processes and its engine.

The one place that imports the rest of parallel/, and only when it is needed: with it blocked from import, one process still trains at
zero_stage 0. Called by train/run.py, which owns the order.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from data.index import ShardIndex, check_tokenizer, open_index
from kernels.grouped_matmul import choose_backend
from model.parameters import materialize
from model.transformer import Transformer
from parallel.config import ProcessInfo
from train.config import Config, Layout
from train.engine import Engine, LocalMesh, PlainEngine, World
from train.optimizer import build_optimizer, parameter_groups


@dataclass(frozen=True)
class Data:
    """The two splits, opened and checked against each other and the config."""

    train: ShardIndex
    heldout: ShardIndex


def open_data(config: Config) -> Data:
    """Opens both splits; ValueError where they do not fit each other or model.vocab_size."""
    train_index, heldout_index = open_index(config.data.shards), open_index(config.data.heldout)
    check_tokenizer(train_index, heldout_index)
    if config.model.vocab_size not in (None, train_index.vocab_size):
        raise ValueError(
            f"model.vocab_size must equal the shards', but model.vocab_size is {config.model.vocab_size} and the tokenizer of "
            f"{config.data.shards} has {train_index.vocab_size} tokens: set model.vocab_size to null, or prepare other shards"
        )
    return Data(train_index, heldout_index)


def set_up_torch(config: Config, info: ProcessInfo) -> torch.device:
    """Device, threads and determinism of this process: with the same of all three, a run repeats its losses bit for bit."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    torch.use_deterministic_algorithms(True)
    # a debugging aid that costs a pass over every new tensor
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // info.local_world_size))
    if config.run.device != "cuda":  # launcher/environment.py has turned auto into what the machine has
        return torch.device("cpu")
    torch.cuda.set_device(info.local_rank)
    return torch.device("cuda", info.local_rank)


def build_model(config: Config, *, vocab_size: int, device: torch.device) -> Transformer:
    """The network on the meta device: shapes and names, no values."""
    dtype, widths = getattr(torch, config.run.dtype), config.model.expert_widths()
    backend = choose_backend(config.model.expert_backend, device=device, dtype=dtype, widths=widths)
    return Transformer(config.model, vocab_size=vocab_size, backend=backend)


@contextlib.contextmanager
def open_world(
    config: Config, info: ProcessInfo, layout: Layout, *, device: torch.device
) -> Iterator[tuple[World, Callable[[Transformer], Engine]]]:
    """Joins the processes; gives the world and what makes an engine of a model that is still on the meta device."""
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
        yield LocalMesh(device), plain_engine
        return

    from parallel.mesh import open_mesh
    from parallel.parallelize import parallelize
    from parallel.zero import ZeroEngine

    with open_mesh(info, ep_size=layout.ep_size, device=device) as mesh:

        def zero_engine(model: Transformer) -> Engine:
            parallelize(model, mesh, seed=config.run.seed)
            groups = parameter_groups(model, weight_decay=config.optim.weight_decay)
            stage = config.parallel.zero_stage
            return ZeroEngine(
                model, groups, lambda split: build_optimizer(split, config.optim), mesh=mesh, stage=stage, **settings
            )

        yield mesh, zero_engine
