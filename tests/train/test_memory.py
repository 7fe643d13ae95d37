"""Transformer-XL memory in training and evaluation: each row is scored with the rows before it in its stream, computed by hand here."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data.loader import Batch
from model.context import BatchContext, Memory
from model.memory import StreamMemory
from tests.model.build import model_config, tokens, transformer
from tests.train.tiny_job import ALONE, tiny_config, write_shards
from train.build import build_memory
from train.config import Config, OptimConfig
from train.engine import LocalMesh, PlainEngine
from train.evaluate import evaluate
from train.optimizer import build_optimizer, parameter_groups
from train.run import run
from train.step import StepSettings, train_step

CPU = torch.device("cpu")
STREAMS, LENGTH, ROWS = 4, 5, 3  # streams, tokens of a row, rows of each stream
TEXT = tokens(STREAMS, LENGTH * ROWS + 1)
SETTINGS = StepSettings(accumulation_steps=2, seed=1, mask_documents=False)


def network(*, memory_blocks: int) -> Any:
    switchhead = {"num_heads": 2, "head_dim": 4, "num_experts": 3, "top_k": 2, "positions": "xl"}
    sections = {"switchhead": switchhead | {"memory_blocks": memory_blocks}, "attention": None}
    return transformer(model_config(mixers=["switchhead"], **sections), dtype=torch.float32)


def batches(*, rows_at_once: int) -> Iterator[Batch]:
    """All rows, in the order of their positions: row p is row p div STREAMS of stream p mod STREAMS."""
    for first in range(0, STREAMS * ROWS, rows_at_once):
        positions = list(range(first, first + rows_at_once))
        spans = [TEXT[p % STREAMS, p // STREAMS * LENGTH :][: LENGTH + 1] for p in positions]
        rows = torch.stack(spans)
        yield Batch(
            tokens_BS=rows[:, :-1],
            targets_BS=rows[:, 1:],
            document_ids_BS=torch.zeros_like(rows[:, 1:]),
            positions_B=torch.tensor(positions),
            continues_B=torch.tensor([p >= STREAMS for p in positions]),
            num_bytes=rows_at_once * LENGTH,
        )


def losses_by_hand(model: Any, *, blocks: int) -> torch.Tensor:
    """Mean cross-entropy (ROWS, STREAMS) of each row, one row at a time, given what the layers saw in its last `blocks` rows."""
    losses = torch.zeros(ROWS, STREAMS)
    for stream in range(STREAMS):
        seen: list[dict[int, torch.Tensor]] = []
        for row in range(ROWS):
            span = TEXT[stream : stream + 1, row * LENGTH :][:, : LENGTH + 1]
            kept = seen[-blocks:]
            states = {depth: torch.cat([past[depth] for past in kept], dim=1) for depth in range(2)} if kept else {}
            memory = Memory(states, torch.tensor([LENGTH * len(kept)])) if kept else None
            output = model(span[:, :-1], BatchContext(torch.zeros(1, dtype=torch.int64), None, 1, 0, memory))
            seen.append(output.layer_inputs)
            losses[row, stream] = torch.nn.functional.cross_entropy(output.logits_BSV[0], span[0, 1:]).detach()
    return losses


def engine_of(model: Any) -> PlainEngine:
    """One that does not learn: its rate is 0."""
    config = OptimConfig.model_validate({"optimizer": "sgd", "lr": 0.0})
    optimizer = build_optimizer(parameter_groups(model, weight_decay=0.0), config)
    return PlainEngine(model, optimizer, clip_grad_norm=1.0, accumulation_steps=2, dtype=torch.float32)


def stream_memory(blocks: int) -> StreamMemory:
    sizes: dict[str, Any] = {"row_length": LENGTH, "d_model": 8, "num_streams": STREAMS, "rank": 0, "num_ranks": 1}
    return StreamMemory({0: blocks, 1: blocks}, device=CPU, **sizes)


def test_a_step_scores_each_row_with_the_memory_of_its_stream():
    """Two micro-steps of two rows visit four streams: the next step goes on where the one before left each of them."""
    model, rows, memory = network(memory_blocks=1), batches(rows_at_once=2), stream_memory(1)
    expected = losses_by_hand(model, blocks=1).mean(1)
    for step in range(ROWS):
        result = train_step(engine_of(model), rows, LocalMesh(CPU), SETTINGS, step=step, lr=0.0, memory=memory)
        assert result.loss == pytest.approx(float(expected[step]), rel=1e-5)


@pytest.mark.parametrize("blocks", [1, 4])
def test_an_evaluation_has_as_many_blocks_as_it_is_asked_for(blocks: int):
    """One as in arXiv 2312.07987 and four as in arXiv 2310.10837, of a model that was trained with one."""
    model = network(memory_blocks=1)
    expected = losses_by_hand(model, blocks=blocks).mean()
    found = evaluate(
        engine_of(model),
        batches(rows_at_once=STREAMS),
        LocalMesh(CPU),
        SETTINGS,
        step=0,
        memory=stream_memory(blocks),
    )
    assert found.loss == pytest.approx(float(expected), rel=1e-5)
    assert found.num_targets == STREAMS * ROWS * LENGTH


def test_one_and_four_blocks_are_different_evaluations():
    model = network(memory_blocks=1)
    one, four = (losses_by_hand(model, blocks=blocks).mean() for blocks in (1, 4))
    assert abs(float(one - four)) > 1e-4


def tiny_run(folder: Path, name: str, **sections: dict[str, Any]) -> Config:
    """A run in folder/name of a model with memory, in micro-steps of half the rows."""
    sections["run"] = {"dir": str(folder / name), "steps": 6, "log_every_steps": 1}
    with_memory = tiny_config(folder).model.model_dump()
    with_memory["switchhead"]["memory_blocks"] = 1
    return tiny_config(folder, model=with_memory, optim={"accumulation_steps": 2}, **sections)


@pytest.mark.usefixtures("torch_as_it_was")
def test_an_evaluation_leaves_the_memory_of_the_training_alone(tmp_path: Path):
    write_shards(tmp_path / "shards", seed=1)
    for name, every in (("often", 1), ("once", 1000)):
        run(tiny_run(tmp_path, name, eval={"every_steps": every}), ALONE)
    often, once = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("often", "once")
    )
    assert [record["loss"] for record in often] == [record["loss"] for record in once]
    assert often[-1]["heldout_loss"] == once[-1]["heldout_loss"]


def test_training_remembers_its_streams_and_an_evaluation_its_own_with_as_many_rows_as_it_is_asked_for(tmp_path: Path):
    config = tiny_run(tmp_path, "run", eval={"memory_blocks": 3})
    world, length = LocalMesh(CPU), config.data.sequence_length
    rows = config.data.global_batch_size // 2
    assert config.data.streams != rows
    for evaluation, streams, blocks in ((False, config.data.streams, 1), (True, rows, 3)):
        memory = build_memory(config, world, evaluation=evaluation)
        assert memory is not None
        assert memory.streams == range(streams)
        shown = memory.read(torch.arange(rows), torch.zeros(rows, dtype=torch.bool))
        sizes = {depth: state.shape for depth, state in shown.states.items()}
        assert sizes == dict.fromkeys(range(config.model.num_layers), (rows, blocks * length, config.model.d_model))
    assert build_memory(tiny_config(tmp_path), world) is None
