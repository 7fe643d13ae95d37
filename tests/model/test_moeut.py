"""MoEUT (arXiv 2405.16039): layers used again over the depth, and the norm that only Q, K and routers read."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import model.context
from model.context import BatchContext, keep_mask
from model.decode import Decoder
from model.parameters import add_updates, states_of
from model.router import RouterReport
from tests.model import by_hand
from tests.model.build import context, model_config, tokens, transformer

SWITCHHEAD = {
    "num_heads": 2,
    "head_dim": 4,
    "num_experts": 3,
    "top_k": 2,
    "entropy_weight": 0.5,
    "entropy_per_head": True,
}


def network(*, num_layers: int, distinct_layers: int | None, **changes: Any) -> Any:
    """Layers of SwitchHead and a feed-forward, dense in this file's default."""
    sections = {
        "switchhead": SWITCHHEAD,
        "attention": None,
        "sigma_moe": None,
        "dense_mlp": {"hidden_dim": 12},
    } | changes
    kinds = {"mixers": ["switchhead"], "feedforwards": ["sigma_moe" if sections["sigma_moe"] else "dense_mlp"]}
    config = model_config(**(kinds | {"num_layers": num_layers, "distinct_layers": distinct_layers} | sections))
    return transformer(config)


def unrolled(shared: Any, **changes: Any) -> Any:
    """A stack without sharing whose layers have the weights of the shared ones."""
    num_layers, distinct = shared.config.num_layers, len(shared.layers)
    stack = network(num_layers=num_layers, distinct_layers=None, **changes)
    values = dict(shared.named_parameters())
    with torch.no_grad():
        for name, parameter in stack.named_parameters():
            _, _, inside = name.removeprefix("layers.").partition(".")
            if name.startswith("layers."):
                depth = int(name.split(".")[1])
                name = f"layers.{depth % distinct}.{inside}"
            parameter.copy_(values[name])
    return stack


def logits_and_gradients(net: Any, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    output = net(rows, context(len(rows)))
    output.logits_BSV.square().sum().backward()
    return output.logits_BSV, {name: value.grad for name, value in net.named_parameters()}


def test_layers_are_used_in_the_order_a_b_a_b_and_their_gradients_are_the_sums_over_the_repeats():
    shared, rows = network(num_layers=6, distinct_layers=2), tokens(2, 7)
    stack = unrolled(shared)
    assert len(shared.layers) == 2
    found, gradients = logits_and_gradients(shared, rows)
    expected, by_depth = logits_and_gradients(stack, rows)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for name, gradient in gradients.items():
        _, number, *inside = name.split(".")
        parts = [by_depth[name]]
        if name.startswith("layers."):
            parts = [by_depth[".".join(["layers", str(depth), *inside])] for depth in range(int(number), 6, 2)]
        torch.testing.assert_close(gradient, torch.stack(parts).sum(0), rtol=1e-10, atol=1e-10, msg=name)


def test_one_repeat_is_an_ordinary_stack():
    shared, plain = (network(num_layers=3, distinct_layers=number) for number in (3, None))
    rows = tokens(2, 5)
    assert torch.equal(shared(rows, context(2)).logits_BSV, plain(rows, context(2)).logits_BSV)


def test_the_regulariser_looks_at_the_mean_over_time_and_repeats_of_each_row_and_head():
    net, rows = network(num_layers=4, distinct_layers=2), tokens(3, 5)
    seen: dict[tuple[int, str], list[Tensor]] = {}
    for number, block in enumerate(net.layers):
        for router in ("value", "output"):
            calls = seen[number, router] = []
            block.mixer.get_submodule(f"{router}_router").register_forward_hook(
                lambda _module, _inputs, logits, calls=calls: calls.append(logits.detach().view(3, 5, 2, 3))
            )
    loss = net(rows, context(3)).auxiliary_loss
    expected = 0.0
    for calls in seen.values():
        assert len(calls) == 2
        for row in range(3):
            for head in range(2):
                times_and_repeats = torch.cat([logits_BSHE[row, :, head] for logits_BSHE in calls])
                expected += 0.5 * by_hand.negative_entropy(times_and_repeats) / (3 * 2)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_each_repeat_has_dropout_masks_of_its_own(monkeypatch: pytest.MonkeyPatch):
    drawn: list[tuple[str, int]] = []

    def recording(facts: BatchContext, length: int, channels: int, *, probability: float, site: str) -> Tensor:
        drawn.append((site, facts.depth))
        return keep_mask(facts, length, channels, probability=probability, site=site)

    monkeypatch.setattr(model.context, "keep_mask", recording)
    network(num_layers=4, distinct_layers=2, dropout=0.3).train()(tokens(1, 4), replace(context(1), depth=-1))
    assert len(set(drawn)) == len(drawn) == 2 + 4 * 3


def test_decoding_equals_the_whole_text_with_a_cache_for_each_repeat():
    net, rows = network(num_layers=4, distinct_layers=2), tokens(2, 9)
    decoder = Decoder(net, block_length=9)
    found = torch.cat([decoder.extend(rows[:, first:last]) for first, last in ((0, 4), (4, 5), (5, 9))], dim=1)
    torch.testing.assert_close(found, net(rows, context(2)).logits_BSV, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("distinct_layers", [None, 2])
def test_with_the_norm_as_identity_peri_is_pre(distinct_layers: int | None, monkeypatch: pytest.MonkeyPatch):
    rows, logits = tokens(2, 6), []
    sizes: dict[str, Any] = {"sigma_moe": {"num_experts": 5, "expert_dim": 4, "top_k": 2}, "dense_mlp": None}
    nets = [network(num_layers=4, distinct_layers=distinct_layers, norm=norm, **sizes) for norm in ("pre", "peri")]
    assert not torch.allclose(*(net(rows, context(2)).logits_BSV for net in nets))
    monkeypatch.setattr("model.layer.LayerNorm.forward", lambda _self, x: x)
    logits = [net(rows, context(2)).logits_BSV for net in nets]
    torch.testing.assert_close(*logits, rtol=1e-12, atol=1e-12)


class _Balanced(torch.nn.Module):
    """A feed-forward that wants to know its loads."""

    balances = True

    def __init__(self) -> None:
        super().__init__()
        self.told: list[dict[str, RouterReport]] = []

    def balance(self, reports: dict[str, RouterReport]) -> None:
        self.told.append(reports)


def test_a_layer_is_told_the_loads_of_all_its_repeats():
    net = network(num_layers=4, distinct_layers=2)
    net.layers[1].feedforward = layer = _Balanced()
    assert net.balances
    reports = {
        f"layers.{depth}.{part}.mlp": RouterReport(*(torch.tensor([10.0**depth + amount]) for amount in range(3)))
        for depth in range(4)
        for part in ("mixer", "feedforward")
    }
    net.balance(reports)
    (told,) = layer.told
    assert told.keys() == {"mlp"}
    assert [part.item() for part in told["mlp"]] == [1010.0, 1012.0, 1014.0]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"num_layers": 5, "distinct_layers": 2}, ["distinct_layers is 2", "num_layers is 5"]),
        ({"mixers": ["switchhead", "attention"], "distinct_layers": 1}, ["mixers has 2", "distinct_layers is 1"]),
        ({"norm": "peri", "mixers": ["attention"], "switchhead": None}, ["norm is peri"]),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence(changes: dict[str, Any], parts: list[str]):
    with pytest.raises(ValueError, match="but") as caught:
        model_config(**({"num_layers": 4} | changes))
    assert all(part in str(caught.value) for part in parts), caught.value


def test_a_running_figure_moves_by_the_mean_of_its_repeats_and_stays_a_variance():
    """24 repeats, each of which alone would move it by a tenth."""
    peer = {"num_experts": 16, "num_heads": 2, "top_k": 2, "key_dim": 4, "query_norm": "batch"}
    config = model_config(
        num_layers=24,
        distinct_layers=1,
        mixers=["attention"],
        feedforwards=["peer"],
        attention={"num_heads": 2, "head_dim": 4},
        peer=peer,
        **dict.fromkeys(("switchhead", "sigma_moe", "dense_mlp")),
    )
    net, rows = transformer(config), tokens(2, 6)
    assert not torch.allclose(block_updates(net, rows, 0), block_updates(net, rows, 1))
    name = "layers.0.feedforward.router.batch_norm.variance"
    updates = net.train()(rows, context(2)).updates
    every = torch.stack([block_updates(net, rows, depth) for depth in range(24)])
    torch.testing.assert_close(updates[name], every.mean(0))
    for step in range(40):
        add_updates(net, net.train()(rows, context(2, step=step)).updates)
    assert states_of(net)[name].min() > 0
    assert net.eval()(rows, context(2)).logits_BSV.isfinite().all()


def block_updates(net: Any, rows: Tensor, depth: int) -> Tensor:
    """What the use of the layer at `depth` would add to its running variance."""
    seen: list[Tensor] = []
    hook = net.layers[0].register_forward_hook(
        lambda *parts: seen.append(parts[-1].updates["feedforward.router.batch_norm.variance"])
    )
    net.train()(rows, context(2))
    hook.remove()
    return seen[depth]
