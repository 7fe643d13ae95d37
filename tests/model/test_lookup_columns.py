"""Tables whose columns are split: partial products, and both layers with a dispatcher that cuts the width as ranks would."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.tables import sums
from model.dispatch import Compute, LocalArriving, LocalDispatcher, LocalExchange, LocalPlan, Ready
from model.lookup import neurons, partial_products, weighted_rows
from model.parameters import Table, materialize
from model.product_key_config import PEERConfig, PKMConfig
from tests.model import build
from tests.model.test_lookup import H, J, K, picks, plan_of


def wide(*, tokens: int, one_expert: bool = False) -> tuple[list[Tensor], LocalPlan]:
    """x, up and down of width 8, and gates, as leaves; the plan of the picks."""
    first, second, gates = picks(tokens=tokens, one_expert=one_expert)
    x, up, down = (build.normal(n, 8, seed=seed) for n, seed in ((tokens, 1), (J * J, 2), (J * J, 3)))
    leaves = [leaf.requires_grad_() for leaf in (x, up, down, gates)]
    return leaves, plan_of(first, second, gates, Table(J * J, {}))


@pytest.mark.parametrize("columns", [1, 2, 4])
@pytest.mark.parametrize(("tokens", "one_expert"), [(7, False), (7, True), (0, False)])
@pytest.mark.parametrize("chunk", [1, 24, 2**20])
def test_products_by_columns_summed_before_the_activation_equal_the_fused_form_and_its_gradients(
    chunk: int, tokens: int, one_expert: bool, columns: int, monkeypatch
):
    monkeypatch.setattr(sums, "CHUNK_ELEMENTS", chunk)
    leaves, plan = wide(tokens=tokens, one_expert=one_expert)
    x, up, down, _ = leaves
    parts = [slice(first, first + 8 // columns) for first in range(0, 8, 8 // columns)]
    z_C = torch.stack([partial_products(x[:, part], up[:, part], plan) for part in parts]).sum(0)
    second = replace(plan, gates_C=plan.gates_C * F.gelu(z_C))
    found = torch.cat([weighted_rows(down[:, part], second) for part in parts], dim=1)
    fused = neurons(x, up, down, plan, activation="gelu")
    cotangent = build.normal(tokens, 8, seed=9)
    torch.testing.assert_close(found, fused, rtol=0, atol=1e-13)
    gradients = [torch.autograd.grad((y * cotangent).sum(), leaves, retain_graph=True) for y in (found, fused)]
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-13)


def test_partial_products_agree_with_finite_differences_and_do_not_see_the_gates(monkeypatch):
    monkeypatch.setattr(sums, "CHUNK_ELEMENTS", 24)
    (x, up, _, _), plan = wide(tokens=4)
    assert torch.autograd.gradcheck(lambda x, up: partial_products(x, up, plan), (x, up))
    gateless = replace(plan, gates_C=torch.full((4 * H * K,), torch.nan))
    assert torch.equal(partial_products(x, up, gateless), partial_products(x, up, plan))


def test_partial_products_keep_only_what_they_were_given():
    (x, up, _, _), plan = wide(tokens=64)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        partial_products(x, up, plan)
    assert [t.data_ptr() for t in kept if t.is_floating_point()] == [x.data_ptr(), up.data_ptr()]
    assert all(t.ndim == 1 for t in kept if not t.is_floating_point())


def test_partial_products_of_rounded_rows_are_float32():
    (x, up, _, _), plan = wide(tokens=7)
    x, up = x.detach().float().requires_grad_(), up.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = partial_products(x, up, plan)
    assert found.dtype == torch.float32
    assert torch.equal(found, partial_products(x.bfloat16(), up, plan))
    assert torch.equal(found, partial_products(x.bfloat16().float(), up, plan))
    for gradient in torch.autograd.grad(found.square().sum(), [x, up]):
        assert gradient.dtype == torch.float32


class ByColumns(LocalDispatcher):
    """Answers as `columns` ranks together: each is given its columns of the rows and of the weights; replies are summed."""

    def __init__(self, columns: int) -> None:
        self.columns, self.column, self.calls = columns, 0, []

    def range_of(self, width: int) -> slice:
        size = width // self.columns
        return slice(self.column * size, (self.column + 1) * size)

    def on_each(
        self, arriving: LocalArriving, compute: Compute, answer: Callable[[LocalArriving, Compute], Any]
    ) -> list:
        found = []
        for column in range(self.columns):
            self.column = column
            part = self.range_of(arriving.rows.shape[1])
            found.append(answer(LocalArriving(arriving.exchange, arriving.rows[:, part]), compute))
        return found

    def reply(self, arriving: LocalArriving, compute: Compute, *, label: str) -> Ready[Tensor]:
        self.calls.append("reply")
        return Ready(torch.stack(self.on_each(arriving, compute, lambda part, one: part.reply(one))).sum(0))

    def combine(
        self, arriving: LocalArriving, compute: Compute, *, label: str, gates_NK: Tensor | None = None
    ) -> Ready[Tensor]:
        self.calls.append("combine" if gates_NK is None else "combine with gates")
        found = self.on_each(arriving, compute, lambda part, one: part.combine(one, gates_NK))
        return Ready(torch.cat(found, dim=1))

    def weights(self, exchange: LocalExchange, *, label: str) -> Any:
        whole, dispatcher = exchange.routing.bank.weights(), self

        class OfTheColumn:
            def __getitem__(self, name: str) -> Tensor:
                return whole[name][:, dispatcher.range_of(whole[name].shape[1])]

        return Ready(OfTheColumn())


LAYERS = {
    "softmax": PEERConfig(num_experts=16, num_heads=2, top_k=3, key_dim=4),
    "relu": PEERConfig(num_experts=16, num_heads=2, top_k=3, key_dim=4, scores="relu", activation="relu"),
    "pkm": PKMConfig(num_keys=4, num_heads=2, top_k=3),
}


def run(layer: Any, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients by name."""
    x = x.clone().requires_grad_()
    y = layer(x, build.context(len(x))).y_BSD
    leaves = {"x": x, **dict(layer.named_parameters())}
    cotangent = build.normal(*y.shape, seed=3)
    gradients = torch.autograd.grad((y * cotangent).sum(), list(leaves.values()))
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("columns", [2, 4])
def test_a_layer_by_columns_equals_the_layer_in_one_piece_with_all_gradients(kind: str, columns: int):
    layer: Any = LAYERS[kind].build(build.place("switchhead", d_model=8))
    materialize(layer, seed=5, dtype=torch.float64)
    layer, x = layer.eval(), build.normal(2, 5, 8)
    expected = run(layer, x)
    table = layer.table if kind == "pkm" else layer.experts
    table.columns, layer.dispatcher = columns, ByColumns(columns)
    found = run(layer, x)
    assert layer.dispatcher.calls == (["combine"] if kind == "pkm" else ["reply", "combine with gates"])
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        torch.testing.assert_close(
            found[name], wanted, rtol=0, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}"
        )
