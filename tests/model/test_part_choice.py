"""The parts of a network that have backends beside its banks: which they are, and the work by which they are compared."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels import top_k_attention
from kernels.tables.routes import LARGE_TABLE
from model.config import ModelConfig
from model.context import BatchContext
from model.parameters import materialize
from model.part_choice import Sizes, part_works, table_work
from model.transformer import Transformer

CPU = torch.device("cpu")
SIZES = Sizes(rows=2, length=12, dtype=torch.float32)
MODEL: dict[str, Any] = {
    "vocab_size": 16,
    "d_model": 24,
    "num_layers": 4,
    "mixers": ["hsm", "attention"],
    "feedforwards": ["peer", "pkm"],
    "hsm": {"variant": "vector"},
    "attention": {"num_heads": 2, "head_dim": 8, "positions": "rope", "attend_top_k": 3},
    "peer": {"num_experts": 64, "num_heads": 2, "top_k": 3, "key_dim": 8},
    "pkm": {"num_keys": 5, "num_heads": 3, "top_k": 4, "key_dim": 8},
}


def model_of(**changes: object) -> Transformer:
    return Transformer(ModelConfig.model_validate({**MODEL, **changes}), vocab_size=16, backend="reference")


def tables_of(model: Transformer, sizes: Sizes = SIZES, columns: int = 1):
    banks = [bank for bank in model.config.banks() if bank.shape.is_table]
    return {
        bank.path: table_work(bank.shape, sizes, num_rows=bank.shape.num_groups, activation="gelu", columns=columns)
        for bank in banks
    }


def test_every_part_is_found_and_takes_a_backend():
    model = model_of()
    works = {**part_works(model, SIZES), **tables_of(model)}
    assert sorted(works) == sorted(
        f"layers.{depth}.{name}"
        for depth, names in enumerate([("mixer", "feedforward.router", "feedforward.experts"),
                                       ("mixer.attend", "feedforward.router", "feedforward.table")] * 2)
        for name in names
    )  # fmt: skip
    assert {model.get_submodule(path).backend for path in works} == {"torch"}


@pytest.mark.parametrize("kind", ["layers.0.mixer", "layers.1.mixer.attend", "layers.0.feedforward.router"])
def test_equal_layers_are_one_work_and_other_sizes_are_another(kind: str):
    works = part_works(model_of(), SIZES)
    later = kind.replace("layers.0", "layers.2").replace("layers.1", "layers.3")
    if kind != "layers.0.mixer":  # the later layer shifts farther
        assert str(works[kind]) == str(works[later])
    for other in (replace(SIZES, rows=3), replace(SIZES, length=16)):
        assert str(part_works(model_of(), other)[kind]) != str(works[kind])


@pytest.mark.parametrize("columns", [1, 2])
def test_each_work_gives_what_the_reference_gives_forward_and_backward(columns: int):
    model = model_of()
    works = {**part_works(model, SIZES), **tables_of(model, columns=columns)}
    for path, work in works.items():
        assert work.candidates("cpu") == ("torch",)
        found, wanted = (work.work(backend, device=CPU)() for backend in ("torch", "reference"))
        assert len(found) == len(wanted) >= 3
        for one, other in zip(found, wanted, strict=True):
            assert other.any()
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=lambda text, path=path: f"{path}: {text}")


def test_a_table_is_measured_with_the_columns_that_are_here_and_not_beyond_what_matters():
    (bank,) = {bank.shape for bank in model_of().config.banks() if bank.shape.name == "experts"}
    output, rows, up, down, gates = table_work(bank, SIZES, num_rows=40, activation="gelu", columns=2).work(
        "torch", device=CPU
    )()
    assert output.shape == rows.shape == (2 * 24, 12)  # of each of the two ranks that share the columns, all tokens
    assert up.shape == down.shape == (40, 12)
    assert gates.shape == (2 * 24 * 2 * 3,)
    assert str(LARGE_TABLE) in str(table_work(bank, SIZES, num_rows=LARGE_TABLE + 1, activation="gelu"))


def test_other_neurons_of_a_table_are_another_work():
    (bank,) = {bank.shape for bank in model_of().config.banks() if bank.shape.name == "experts"}
    gelu, relu = (table_work(bank, SIZES, num_rows=40, activation=name) for name in ("gelu", "relu"))
    assert str(gelu) != str(relu)
    assert not torch.equal(gelu.work("torch", device=CPU)()[0], relu.work("torch", device=CPU)()[0])


def test_rows_arrive_from_every_rank_whose_tokens_chose_of_these():
    """Against a draw: of 6 ranks, 3 ranges of rows of 2 columns, each with 500 tokens of 2 x 3 choices."""
    (bank,) = {bank.shape for bank in model_of().config.banks() if bank.shape.name == "experts"}
    sizes, generator = Sizes(rows=1, length=500, dtype=torch.float32), torch.Generator().manual_seed(1)
    range_TK = torch.randint(3, (6 * 500, 2 * 3), generator=generator)
    received, copies = int((range_TK == 0).any(1).sum()), int((range_TK == 0).sum())
    output, *_, gates = table_work(bank, sizes, num_rows=64, activation="gelu", ranges=3, columns=2).work(
        "torch", device=CPU
    )()
    assert len(output) == pytest.approx(received, rel=0.03)
    assert len(gates) == pytest.approx(copies, rel=0.03)


def test_what_torch_computes_by_itself_is_no_part():
    dense = {"attention": {**MODEL["attention"], "attend_top_k": None}, "pkm": {**MODEL["pkm"], "top_k": None}}
    works = part_works(model_of(**dense), SIZES)
    assert not [path for path in works if path.startswith(("layers.1.", "layers.3."))]
    gates = part_works(model_of(hsm={"variant": "single_gate"}), SIZES)
    assert "layers.0.mixer" not in gates


@pytest.mark.parametrize("path", ["layers.0.mixer", "layers.1.mixer.attend", "layers.0.feedforward.router",
                                  "layers.0.feedforward.experts", "layers.1.feedforward.router", "layers.1.feedforward.table"])  # fmt: skip
def test_every_part_computes_with_the_backend_that_it_was_given(path: str):
    model = model_of()
    materialize(model, seed=1)
    model.get_submodule(path).backend = "another"  # type: ignore[assignment]
    tokens = torch.arange(12)[None] % 16
    with pytest.raises(ValueError, match="must be one of triton, torch, reference, got 'another'"):
        model(tokens, BatchContext(torch.zeros(1, dtype=torch.int64), None, 1, 0))


@pytest.mark.parametrize(
    ("changes", "serving"),
    [
        ({}, ("triton", "torch")),
        ({"positions": "xl"}, ("torch",)),
        ({"attention_dropout": 0.1}, ("torch",)),
        ({"attend_top_k": 257}, ("torch",)),
        ({"attend_top_k": 257, "attend_chunk": 4}, ("torch",)),
        ({"head_dim": 256}, ("torch",)),
    ],
)
def test_on_a_gpu_triton_is_a_candidate_for_the_attention_that_it_has(monkeypatch, changes: dict, serving: tuple):
    monkeypatch.setattr(top_k_attention, "why_not_triton", lambda device_type: None)
    works = part_works(model_of(attention=MODEL["attention"] | changes), SIZES)
    assert works["layers.1.mixer.attend"].candidates("cuda") == serving


def test_the_memory_of_a_layer_is_among_its_keys():
    attention = MODEL["attention"] | {"positions": "xl", "memory_blocks": 2}
    assert "best 3 of 36 keys" in str(part_works(model_of(attention=attention), SIZES)["layers.1.mixer.attend"])
