"""A step and an evaluation against sums made by hand, with an engine whose model is a table of logits."""

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch

from data.loader import Batch
from model.context import BatchContext
from model.loss import IGNORED
from model.router import RouterReport
from model.transformer import ModelOutput
from tests.parallel.two_steps import open_world
from train.engine import Engine, LocalMesh
from train.evaluate import evaluate
from train.step import StepSettings, _reduce, _Totals, total_reports, train_step

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.5], [-3.0, 1.0, 4.0]])
WORLD = LocalMesh(torch.device("cpu"))
SETTINGS = StepSettings(accumulation_steps=2, seed=1, mask_documents=True)


class TableEngine:
    """Logits of a token are a row of a table; remembers what it was asked."""

    def __init__(self, *, norm: float = 1.5, scale: float = 1.0) -> None:
        self.model = cast(Any, torch.nn.Linear(1, 1))
        self.model.balances = False
        self.table = (LOGITS * scale).requires_grad_()
        self.norm = norm
        self.losses: list[tuple[float, bool]] = []
        self.rates: list[float] = []
        self.documents: list[Any] = []

    def forward(self, tokens_BS: torch.Tensor, context: BatchContext) -> ModelOutput:
        self.documents.append(context.document_ids_BS)
        counts = torch.bincount(tokens_BS.flatten(), minlength=3).float()
        report = RouterReport(counts, counts / 2, torch.tensor(float(tokens_BS.numel())))
        return ModelOutput(self.table[tokens_BS], self.table.sum() * 0 - 0.25, {"mlp": report}, {}, {})

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self.losses.append((loss.item(), last))

    def step(self, lr: float, *, accept: Callable[[float], bool]) -> float:
        if accept(self.norm):
            self.rates.append(lr)
        return self.norm


def batch(tokens: list[list[int]], targets: list[list[int]], num_bytes: int) -> Batch:
    rows = len(tokens)
    return Batch(
        tokens_BS=torch.tensor(tokens),
        targets_BS=torch.tensor(targets),
        document_ids_BS=torch.zeros(rows, len(tokens[0]), dtype=torch.int64),
        positions_B=torch.arange(rows),
        continues_B=torch.zeros(rows, dtype=torch.bool),
        num_bytes=num_bytes,
    )


def batches() -> Iterator[Batch]:
    """Four targets, then one: the micro-steps weigh the same although their numbers of targets differ."""
    yield batch([[0, 1], [2, 2]], [[0, 1], [2, 0]], 8)
    yield batch([[1, 0]], [[IGNORED, 2]], 3)


def cross_entropy(token: int, target: int) -> float:
    exponentials = [math.exp(x) for x in LOGITS[token].tolist()]
    return -math.log(exponentials[target] / sum(exponentials))


FIRST = (cross_entropy(0, 0) + cross_entropy(1, 1) + cross_entropy(2, 2) + cross_entropy(2, 0)) / 4
SECOND = cross_entropy(0, 2)


def step_of(engine: TableEngine, rows: Iterator[Batch]):
    return train_step(cast(Engine, engine), rows, WORLD, SETTINGS, step=3, lr=0.125)


def test_the_loss_of_a_step_is_the_mean_over_micro_steps_of_their_means_over_targets():
    engine = TableEngine()
    result = step_of(engine, batches())
    assert result.loss == pytest.approx((FIRST + SECOND) / 2, rel=1e-6)
    assert result.auxiliary_loss == -0.25
    assert result.nats == pytest.approx(4 * FIRST + SECOND, rel=1e-6)  # not loss * num_targets
    assert (result.grad_norm, result.num_targets, result.num_bytes) == (1.5, 5, 11)
    assert engine.losses == [(pytest.approx(FIRST - 0.25), False), (pytest.approx(SECOND - 0.25), True)]
    assert engine.rates == [0.125]
    assert all(documents.shape[1] == 2 for documents in engine.documents)


def test_reports_are_summed_over_micro_steps():
    result = step_of(TableEngine(), batches())
    total = total_reports(result.reports, WORLD)["mlp"]
    assert total.count_G.tolist() == [2.0, 2.0, 2.0]
    assert float(total.num_rows) == 6.0


def test_a_micro_step_without_a_target_counts_as_zero():
    nothing = batch([[0, 1]], [[IGNORED, IGNORED]], 0)
    result = step_of(TableEngine(), iter([nothing, nothing]))
    assert (result.loss, result.num_targets) == (0.0, 0)


@pytest.mark.parametrize(
    "engine", [TableEngine(norm=math.inf), TableEngine(norm=math.nan), TableEngine(scale=math.nan)]
)
def test_a_loss_or_norm_that_is_not_finite_is_an_error(engine: TableEngine):
    with pytest.raises(RuntimeError, match="must be finite, but at step 4"):
        step_of(engine, batches())


def read(error: Exception) -> Iterator[Batch]:
    """One good micro-step, then what a reader raises."""
    yield next(batches())
    raise error


def step_with_a_corrupt_row(failing: int) -> tuple[str, str, int]:
    with open_world(1) as mesh:
        engine = TableEngine()
        rows = read(RuntimeError("shard 7 is damaged")) if mesh.rank == failing else batches()
        try:
            train_step(cast(Engine, engine), rows, mesh, SETTINGS, step=3, lr=0.125)
        except Exception as error:
            return type(error).__name__, str(error), len(engine.losses)
        return "nothing", "", len(engine.losses)


class OneOfTwo(LocalMesh):
    """A rank that the other adds nothing to."""

    world_size = 2

    def __init__(self, rank: int) -> None:
        super().__init__(torch.device("cpu"))
        self.rank = rank


@pytest.mark.parametrize("norm", [1.5, math.inf, math.nan])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_norm_is_that_of_rank_0_and_any_rank_s_that_is_not_finite(rank: int, norm: float):
    """As it is: 0 times infinity would be told as nan."""
    found = _reduce(_Totals(), OneOfTwo(rank), grad_norm=norm, ends=False, accumulation_steps=1).grad_norm
    expected = 0.0 if rank == 1 and norm == 1.5 else norm
    assert found == pytest.approx(expected, nan_ok=True)


def test_a_row_that_one_rank_cannot_read_ends_the_step_on_every_rank_with_one_sentence(pool):
    found = pool(2).run(step_with_a_corrupt_row, 1, timeout=30)
    assert found == [("RuntimeError", "shard 7 is damaged (rank 1 of 2)", 1)] * 2


class CountingMesh(LocalMesh):
    """LocalMesh that counts its collectives."""

    calls = 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().sum(values)

    def raise_together(self, error: Exception | None) -> None:
        self.calls += 1
        super().raise_together(error)


def test_a_good_step_makes_one_small_collective_for_each_micro_step_and_one_for_its_totals():
    world = CountingMesh(torch.device("cpu"))
    train_step(cast(Engine, TableEngine()), batches(), world, SETTINGS, step=0, lr=0.1)
    assert world.calls == SETTINGS.accumulation_steps + 1


class SteppingMesh(CountingMesh):
    """Notes when a step begins and ends, and how many collectives were made before."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.notes: list[tuple[str, int]] = []

    def begin_step(self, step: int) -> None:
        self.notes.append((f"begin {step}", self.calls))

    def end_step(self) -> None:
        self.notes.append(("end", self.calls))


def test_the_world_is_told_the_number_of_the_step_before_its_first_collective_and_its_end_after_the_last():
    world = SteppingMesh()
    train_step(cast(Engine, TableEngine()), batches(), world, SETTINGS, step=4, lr=0.1)
    assert world.notes == [("begin 5", 0), ("end", world.calls)]


def test_an_evaluation_weighs_every_target_the_same_and_leaves_the_model_in_training_mode():
    engine = TableEngine()
    found = evaluate(cast(Engine, engine), batches(), WORLD, SETTINGS, step=0)
    nats = 4 * FIRST + SECOND
    assert found.loss == pytest.approx(nats / 5, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / 11, rel=1e-6)
    assert (found.num_targets, found.num_bytes) == (5, 11)
    assert engine.model.training
    assert engine.losses == []
