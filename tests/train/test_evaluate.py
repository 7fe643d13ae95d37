"""An evaluation with a real model: nothing of training acts in it, and training finds the model as it was."""

from collections.abc import Iterator

import torch

from data.loader import Batch
from model.config import ModelConfig
from model.parameters import materialize
from model.transformer import Transformer
from train.engine import LocalMesh, PlainEngine
from train.evaluate import evaluate
from train.optimizer import parameter_groups
from train.step import StepSettings

SIZES = {
    "d_model": 8,
    "num_layers": 2,
    "mixers": ["switchhead"],
    "feedforwards": ["sigma_moe", "dense_mlp"],
    "dense_mlp": {"hidden_dim": 12},
}


def engine(*, dropout: float) -> PlainEngine:
    """In training mode, as a step leaves it; every kind of dropout has the same chance."""
    routed = {"num_experts": 4, "top_k": 2, "expert_dropout": dropout}
    values = SIZES | {"switchhead": {"num_heads": 2, "head_dim": 4, **routed}, "sigma_moe": {"expert_dim": 6, **routed}}
    model = Transformer(ModelConfig.model_validate(values | {"dropout": dropout}), vocab_size=11, backend="reference")
    materialize(model, seed=3)
    optimizer = torch.optim.SGD(parameter_groups(model, weight_decay=0.0), lr=0.1)
    return PlainEngine(model.train(), optimizer, clip_grad_norm=0.0, accumulation_steps=1, dtype=torch.float32)


def batches() -> Iterator[Batch]:
    for first in (0, 3):
        tokens = torch.randint(0, 11, (3, 10), generator=torch.Generator().manual_seed(first))
        yield Batch(
            tokens_BS=tokens[:, :-1],
            targets_BS=tokens[:, 1:],
            document_ids_BS=torch.zeros(3, 9, dtype=torch.int64),
            positions_B=torch.arange(first, first + 3),
            continues_B=torch.zeros(3, dtype=torch.bool),
            num_bytes=27,
        )


def loss(engine: PlainEngine) -> float:
    settings = StepSettings(accumulation_steps=1, seed=1, mask_documents=True)
    return evaluate(engine, batches(), LocalMesh(torch.device("cpu")), settings, step=4).loss


def test_nothing_is_dropped_in_an_evaluation():
    assert loss(engine(dropout=0.5)) == loss(engine(dropout=0.0))


def test_the_whole_model_trains_on_after_an_evaluation():
    trained = engine(dropout=0.5)
    loss(trained)
    assert all(module.training for module in trained.model.modules())
    assert all(parameter.grad is None for parameter in trained.model.parameters())
