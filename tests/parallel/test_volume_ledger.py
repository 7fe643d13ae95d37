"""The bytes that the ledger counts against the formulas: a whole model, forward and backward, by layer, bank, verb and direction.

Every head chooses all of its groups, so what is expected of a routing is what happens, to the byte.
"""

from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.context import BatchContext
from model.transformer import Transformer
from parallel.parallelize import parallelize
from parallel.volume import BankExchange, ExpertGroup, Leg, token_bytes, weight_bytes
from tests.parallel.two_steps import open_world

PROCESSES, ROWS, LENGTH, VOCABULARY = 4, 1, 6, 11
CONFIG: dict[str, Any] = {
    "d_model": 16,
    "num_layers": 4,
    "mixers": ["switchhead"],
    "feedforwards": ["sigma_moe", "sigma_moe", "pkm", "peer"],
    "switchhead": {"num_heads": 3, "head_dim": 4, "num_experts": 3, "top_k": 3, "experts": ["q", "k", "v", "o"]},
    "sigma_moe": {"num_experts": 5, "expert_dim": 4, "top_k": 5, "hidden_dropout": 0.5},
    "pkm": {"num_keys": 3, "num_heads": 2, "top_k": 9},
    "peer": {"num_experts": 9, "num_heads": 2, "top_k": 9, "key_dim": 4},
}
MODEL = ModelConfig.model_validate(CONFIG)
Key = tuple[str, str, str, bool]  # layer, label, verb, backward


def counted(
    ep_size: int, node_size: int, mode: Any, columns: int, chunks: int, dtype: str
) -> dict[Key, tuple[int, int]]:
    """What this rank's ledger has of the layers after one forward and backward pass."""
    exchanges = {
        bank.path: BankExchange(mode, columns if bank.shape.is_table else 1, 0.0, 0.0) for bank in MODEL.banks()
    }
    mixed = torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else nullcontext()
    with open_world(ep_size, node_size=node_size) as mesh:
        model = Transformer(MODEL, vocab_size=VOCABULARY, backend="reference")
        parallelize(model, mesh, seed=3, exchanges=exchanges, chunks=chunks)
        model.train()
        mesh.ledger.take()
        tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(mesh.rank))
        with mixed:
            output = model(tokens, BatchContext(torch.arange(ROWS) + ROWS * mesh.rank, None, 1, 0))
        (output.logits_BSV.float().square().sum() + output.auxiliary_loss).backward()
        sent = mesh.ledger.take().sent
    return {
        (where.layer, where.label, where.verb, where.backward): (bytes_.near, bytes_.far)
        for where, bytes_ in sent.items()
        if where.layer.startswith("layers.") and where.verb != "statistics"
    }


def by_formula(
    ep_size: int, node_size: int, mode: Any, columns: int, chunks: int, dtype: str
) -> dict[Key, tuple[float, float]]:
    group, wire_bytes = ExpertGroup(ep_size, node_size), 2 if dtype == "bfloat16" else 4
    expected: dict[Key, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for bank in MODEL.banks():
        if mode == "weights":
            legs = weight_bytes(bank.shape, group, wire_bytes=wire_bytes)
        else:
            of_bank = columns if bank.shape.is_table else 1
            legs = token_bytes(
                bank.shape, group, tokens=ROWS * LENGTH, wire_bytes=wire_bytes, columns=of_bank, chunks=chunks
            )
        for layer in bank.uses:
            for leg, sent in legs.items():
                both = expected[layer, *_place(leg, bank.shape.label), leg.backward]
                both[0], both[1] = both[0] + sent.near, both[1] + sent.far
    return {key: (near, far) for key, (near, far) in expected.items() if near or far}


def _place(leg: Leg, label: str) -> tuple[str, str]:
    """Label and verb: all banks of a layer are planned together."""
    return ("", "plan") if leg.name in ("counts", "metadata") else (label, leg.name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("ep_size", "node_size", "mode", "columns", "chunks"),
    [
        (2, 4, "tokens", 1, 1),
        (2, 4, "tokens", 2, 1),
        (4, 4, "tokens", 1, 1),
        (4, 4, "tokens", 1, 4),
        (4, 4, "tokens", 2, 1),
        (4, 4, "tokens", 4, 1),
        (4, 2, "tokens", 1, 1),
        (4, 2, "tokens", 1, 4),
        (4, 2, "tokens", 4, 1),
        (4, 2, "tokens", 2, 4),
        (4, 1, "tokens", 1, 1),
        (4, 4, "weights", 1, 1),
        (4, 2, "weights", 1, 1),
        (2, 1, "weights", 1, 1),
    ],
)
def test_the_ledger_counts_what_the_formulas_say(
    pool, ep_size: int, node_size: int, mode: str, columns: int, chunks: int, dtype: str
):
    arguments = (ep_size, node_size, mode, columns, chunks, dtype)
    found: dict[Key, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for of_rank in pool(PROCESSES).run(counted, *arguments):
        for key, (near, far) in of_rank.items():
            found[key][0] += near / PROCESSES
            found[key][1] += far / PROCESSES
    means = {key: (near, far) for key, (near, far) in found.items() if near or far}
    expected = by_formula(*arguments)
    assert means.keys() == expected.keys()
    assert {key: value for key, value in means.items() if value != pytest.approx(expected[key])} == {}
