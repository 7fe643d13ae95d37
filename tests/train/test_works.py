"""What is measured for a run is what its training calls: the operations, their shapes, dtypes and settings, and the dtype of autocast."""

from pathlib import Path
from typing import Any

import pytest
import torch

from model.expert_choice import BankWork
from tests.model.recorded import Call, recorded_calls
from tests.train.tiny_job import ALONE, tiny_config, write_shards
from train.build import build_model, choose_exchanges
from train.config import Config, Layout
from train.run import run
from train.works import bank_works, sizes_of, table_works, works_of

CPU = torch.device("cpu")
ATTENTION = {"num_heads": 2, "head_dim": 4}
SWITCHHEAD = ATTENTION | {"num_experts": 3, "top_k": 2}
PEER = {"num_experts": 25, "num_heads": 2, "top_k": 3, "key_dim": 4}
MODELS: dict[str, dict[str, Any]] = {
    "switchhead, sigma-MoE": {"switchhead": SWITCHHEAD, "sigma_moe": {"num_experts": 5, "expert_dim": 4, "top_k": 2}},
    "all projections, memory, hidden kept": {
        "switchhead": SWITCHHEAD
        | {"experts": ["q", "k", "v", "o"], "routers": "separate", "positions": "xl", "memory_blocks": 1},
        "sigma_moe": {"num_experts": 5, "expert_dim": 4, "top_k": 2, "keep_hidden": True},
    },
    "dropout of hidden activations, average keys": {
        "switchhead": SWITCHHEAD,
        "sigma_moe": {
            "num_experts": 5,
            "expert_dim": 4,
            "top_k": 2,
            "router": "average_keys",
            "num_shared_experts": 1,
            "hidden_dropout": 0.3,
        },
    },
    "the best keys by distance too, neurons of relu": {
        "attention": ATTENTION | {"positions": "xl", "memory_blocks": 1, "attend_top_k": 3},
        "peer": PEER | {"activation": "relu", "scores": "sigmoid"},
    },
    "dropout of attention, by distance too": {
        "switchhead": SWITCHHEAD | {"positions": "xl", "attention_dropout": 0.2},
        "sigma_moe": {"num_experts": 5, "expert_dim": 4, "top_k": 2, "router": "softmax_after"},
    },
    "top-k attention, PEER": {
        "attention": ATTENTION | {"num_kv_heads": 1, "attend_top_k": 3, "attend_chunk": 4},
        "peer": PEER,
    },
    "shift mixing, PKM": {
        "hsm": {"variant": "multihead", "num_heads": 2, "boundary": "self"},
        "pkm": {"num_keys": 5, "num_heads": 2, "top_k": 3, "key_dim": 4},
    },
    "shift mixing, one query for all heads": {
        "hsm": {"variant": "constant"},
        "pkm": {"num_keys": 5, "num_heads": 2, "top_k": 3, "key_dim": None, "shared_keys": False, "gated": True},
    },
}

OF_TWO_RANKS = [
    "switchhead, sigma-MoE",
    "dropout of hidden activations, average keys",
    "the best keys by distance too, neurons of relu",
    "top-k attention, PEER",
    "shift mixing, PKM",
]


def config_of(folder: Path, model: str, dtype: str = "bfloat16", **sections: dict[str, Any]) -> Config:
    """Two micro-steps of two rows of 8 tokens, and backends that need no measurement."""
    mixer, feedforward = MODELS[model]
    kinds = {"mixers": [mixer], "feedforwards": [feedforward], "switchhead": None, "sigma_moe": None}
    names = {"expert_backend": "loop", "kernel_backend": "torch"}
    fields: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder / "run"), "steps": 1, "dtype": dtype},
        "model": kinds | MODELS[model] | names,
        "optim": {"accumulation_steps": 2},
    }
    return tiny_config(folder, **{name: fields.get(name, {}) | sections.get(name, {}) for name in fields | sections})


def calls_of_run(config: Config, info: Any) -> set[Call]:
    with recorded_calls() as calls:
        run(config, info)
    return set(calls)


def measured_calls(config: Config, layout: Layout, *, processes: int) -> set[Call]:
    model = build_model(config, vocab_size=257)
    exchanges = choose_exchanges(config, layout, processes=processes) if layout.ep_size > 1 else {}
    with recorded_calls() as calls:
        for work in works_of(config, layout, exchanges, model, processes=processes).values():
            work.work("loop" if isinstance(work, BankWork) else "torch", device=CPU)()
    return set(calls)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("model", MODELS)
def test_what_is_measured_is_what_training_calls(tmp_path: Path, torch_as_it_was, model: str, dtype: str):
    write_shards(tmp_path / "shards", seed=1)
    config = config_of(tmp_path, model, dtype)
    found = measured_calls(config, Layout(ep_size=1, node_size=1), processes=1)
    assert found == calls_of_run(config, ALONE)
    assert len({call[0] for call in found}) >= 2


def calls_here(values: dict[str, Any]) -> tuple[set[Call], set[Call]]:
    """On a rank of a pool of two: of a whole run, and of what is measured for it."""
    config = Config.model_validate(values)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    place = {"rank": rank, "world_size": size, "local_rank": rank, "local_world_size": size}
    layout = Layout(ep_size=config.parallel.ep_size, node_size=size)  # type: ignore[arg-type]
    return calls_of_run(config, ALONE.model_copy(update=place)), measured_calls(config, layout, processes=size)


def without_counts(told: Any) -> Any:
    """Of rows that come from other ranks nobody knows before how many they are."""
    if not isinstance(told, tuple):
        return None if type(told) is int else told
    if told and isinstance(told[0], torch.dtype):
        return told[0], told[1][1:], told[2]
    return "whole" if told[:1] == ("whole",) else tuple(map(without_counts, told))


@pytest.mark.parametrize("exchange", ["tokens", "weights"])
@pytest.mark.parametrize("model", OF_TWO_RANKS)
def test_what_is_measured_is_what_training_calls_on_two_ranks(tmp_path: Path, pool, model: str, exchange: str):
    """The experts are split: five, and a table of 25 rows, so that the second rank holds padding."""
    write_shards(tmp_path / "shards", seed=1)
    parallel = {"ep_size": 2, "zero_stage": 1, "exchange": exchange}
    config = config_of(tmp_path, model, data={"global_batch_size": 8}, parallel=parallel)
    for called, measured in pool(2).run(calls_here, config.model_dump(mode="json"), timeout=100):
        if exchange == "tokens":
            called, measured = ({without_counts(call) for call in calls} for calls in (called, measured))
        assert measured == called


def test_the_sizes_are_those_of_a_micro_step_of_a_rank_up_to_what_is_worth_measuring(tmp_path: Path):
    def sizes(
        length: int, batch: int, processes: int, device: str = "cpu", **data: Any
    ) -> tuple[int, int, torch.dtype]:
        fields = {"sequence_length": length, "global_batch_size": batch, "streams": batch} | data
        found = sizes_of(
            tiny_config(tmp_path, data=fields, run={"device": device, "dtype": "bfloat16"}), processes=processes
        )
        return found.rows, found.length, found.dtype

    assert sizes(8, 4, 1) == (4, 8, torch.bfloat16)
    assert sizes(8, 4, 2) == (2, 8, torch.bfloat16)
    assert sizes(512, 16, 2) == (4, 512, torch.bfloat16)  # 2,048 tokens of a CPU
    assert sizes(4096, 16, 2) == (1, 2048, torch.bfloat16)
    assert sizes(512, 1024, 2, "cuda") == (512, 512, torch.bfloat16)  # of a GPU all: tiles are kept by sizes
    assert sizes(2**18, 2, 2, "cuda") == (1, 2**18, torch.bfloat16)


@pytest.mark.parametrize(("exchange", "parts"), [("tokens", 3), ("weights", 1)])
@pytest.mark.parametrize("model", ["switchhead, sigma-MoE", "top-k attention, PEER"])
def test_what_comes_in_parts_is_measured_in_parts(tmp_path: Path, model: str, exchange: str, parts: int):
    """The gates of a work are one for each choice: of 16 tokens, in three parts of at most 6."""

    def num_gates(chunks: int) -> list[int]:
        parallel = {"ep_size": 2, "zero_stage": 1, "exchange": exchange, "chunks": chunks, "table_columns": 1}
        config = config_of(tmp_path, model, "float32", data={"global_batch_size": 8}, parallel=parallel)
        layout = Layout(ep_size=2, node_size=2)
        exchanges = choose_exchanges(config, layout, processes=2)
        banks = bank_works(config, layout, exchanges, processes=2)
        works = [*banks.values(), *table_works(config, layout, exchanges, processes=2).values()]
        return [work.work("torch", device=CPU)()[-1].numel() for work in works]

    assert [number * 6 for number in num_gates(1)] == [number * (16 if parts == 3 else 6) for number in num_gates(3)]


def test_documents_are_in_the_sizes_where_they_are_masked(tmp_path: Path):
    found = [
        sizes_of(tiny_config(tmp_path, data={"document_mask": mask}), processes=1).documents for mask in (True, False)
    ]
    assert found == [True, False]
