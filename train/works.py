"""What each bank of experts, table and other part of a model does on one rank in a training micro-step, to be measured.

Owns: the sizes and dtypes that follow from a run's config and layout. Does not own: the works themselves (model/expert_choice.py,
model/part_choice.py), which backend they get (train/backends.py). Called by train/build.py.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from model.expert_choice import BankWork
from model.part_choice import PartWork, Sizes, part_works, table_work
from model.selection import GATES
from model.transformer import Transformer
from model.work import Work
from train.config import Config, Layout

if TYPE_CHECKING:
    from parallel.volume import BankExchange

MAX_TOKENS_ON_CPU = 2048  # of a measurement: a pass of 2,048 tokens through a 47M layer is 0.2 s


def works_of(
    config: Config, layout: Layout, exchanges: "Mapping[str, BankExchange]", model: Transformer, *, processes: int
) -> dict[str, Work]:
    """By path, everything in the model, not yet narrowed, that has backends. exchanges: by path, empty without expert parallelism."""
    return {
        **bank_works(config, layout, exchanges, processes=processes),
        **table_works(config, layout, exchanges, processes=processes),
        **part_works(model, sizes_of(config, processes=processes)),
    }


def sizes_of(config: Config, *, processes: int) -> Sizes:
    """What one of the processes works on in a training micro-step, on a CPU as much of it as is worth measuring.

    On a GPU all of it, however much: tiles are kept by sizes, and a step of other sizes would take the first ones.
    """
    rows, length = _micro_rows(config) // processes, config.data.sequence_length
    if config.run.device != "cuda":
        length = min(length, MAX_TOKENS_ON_CPU)
        rows = min(rows, MAX_TOKENS_ON_CPU // length)
    return Sizes(rows, length, getattr(torch, config.run.dtype), documents=config.mask_documents)


def _micro_rows(config: Config) -> int:
    return config.data.global_batch_size // config.optim.accumulation_steps


def bank_works(
    config: Config, layout: Layout, exchanges: "Mapping[str, BankExchange]", *, processes: int
) -> dict[str, BankWork]:
    """What each bank but tables does in a training micro-step on one of the processes, or with a part of it where that comes in parts.

    Where tokens travel, a rank gets as many copies as its own tokens have, but of more rows, of which fewer copies each are here. What is
    measured has that number of copies and the rank's own number of rows: every key of a tile and every product goes by copies, and all
    candidates gather a row for each copy.
    """
    tokens = sizes_of(config, processes=processes).tokens
    mlp = config.model.sigma_moe
    works = {}
    for bank in config.model.banks():
        if bank.shape.is_table:
            continue
        mode = exchanges[bank.path].mode if layout.ep_size > 1 else None
        num_local = math.ceil(bank.shape.num_groups / layout.ep_size)
        works[bank.path] = BankWork(
            bank.shape,
            tokens=math.ceil(tokens * bank.shape.token_factor / (config.parallel.chunks if mode == "tokens" else 1)),
            num_groups=num_local if mode == "tokens" else num_local * layout.ep_size,
            exchange=mode,
            dtype=getattr(torch, config.run.dtype),
            keep_hidden=mlp is not None and mlp.keep_hidden,
            open_gates=mlp is not None and bank.shape.label == "mlp" and GATES[mlp.router] == "open",
        )
    return works


def table_works(
    config: Config, layout: Layout, exchanges: "Mapping[str, BankExchange]", *, processes: int
) -> dict[str, PartWork]:
    """The same of tables, whose rows and columns are where their exchange says."""
    peer = config.model.peer
    works = {}
    for bank in config.model.banks():
        if not bank.shape.is_table:
            continue
        mode = exchanges[bank.path].mode if layout.ep_size > 1 else None
        columns = exchanges[bank.path].columns if mode == "tokens" else 1
        ranges = layout.ep_size // columns if mode == "tokens" else 1
        num_local = math.ceil(bank.shape.num_groups / (layout.ep_size // columns))
        sizes, parts = sizes_of(config, processes=processes), config.parallel.chunks if mode == "tokens" else 1
        works[bank.path] = table_work(
            bank.shape,
            replace(sizes, rows=1, length=math.ceil(sizes.tokens / parts)),
            num_rows=num_local if mode == "tokens" else num_local * layout.ep_size,
            activation="gelu" if peer is None else peer.activation,
            ranges=ranges,
            columns=columns,
            exchange=mode,
        )
    return works
