"""sigma-MoE against the specification written out by hand (invariants 1 to 5, 8 and 10 of its section 13)."""

import math

import pytest
import torch
from torch import Tensor

from tests.model import by_hand
from tests.model.build import (
    OPEN,
    context,
    gradients_agree,
    losses_of,
    normal,
    set_logits,
    sigma_moe,
    sigma_moe_weights,
    with_constant_channel,
)
from tests.model.watch import Recorded, assert_float32_throughout


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_the_forward_equals_the_specification_token_by_token_with_the_gate_on_the_output(top_k: int):
    layer, x = sigma_moe(top_k=top_k), normal(2, 6, 6)
    expected = torch.stack([by_hand.sigma_moe(row, **sigma_moe_weights(layer), top_k=top_k) for row in x])
    torch.testing.assert_close(layer(x, context(2)).y_BSD, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("logit", "share"), [(OPEN, 1.0), (0.0, 0.5)])
def test_all_experts_are_the_dense_mlp_of_joined_experts_with_open_gates_and_half_of_it_with_a_zero_router(
    logit, share
):
    layer, x = sigma_moe(top_k=5), with_constant_channel(normal(2, 6, 6))
    set_logits(layer.router, logit)
    weights = sigma_moe_weights(layer)
    up, down = torch.cat(list(weights["up_EDF"]), dim=1), torch.cat(list(weights["down_EFD"]), dim=0)
    expected = torch.stack([by_hand.dense_mlp(row, up_DF=up, down_FD=down) for row in x])
    torch.testing.assert_close(layer(x, context(2)).y_BSD, share * expected, rtol=0, atol=1e-13)


def test_permuting_experts_with_their_router_rows_changes_nothing():
    layer, x, order = sigma_moe(), normal(2, 6, 6), [3, 0, 4, 1, 2]
    before = layer(x, context(2)).y_BSD
    with torch.no_grad():
        for weight in (layer.experts.up, layer.experts.down):
            weight.copy_(weight[order])
        assert not torch.allclose(layer(x, context(2)).y_BSD, before)
        layer.router.weight.copy_(layer.router.weight[order])
    torch.testing.assert_close(layer(x, context(2)).y_BSD, before, rtol=0, atol=1e-13)


def logit_gradients(entropy_weight: float) -> tuple[Tensor, Tensor]:
    """Router logits (T, E) and their gradients under a loss on the output and the auxiliary loss; no expert's ReLU is all zero."""
    layer, x = sigma_moe(entropy_weight=entropy_weight, expert_dim=16), normal(2, 6, 6)
    logits = Recorded(layer.router)
    result = layer(x, context(2))
    loss = (result.y_BSD * normal(2, 6, 6, seed=3)).sum()
    torch.stack([loss, *losses_of(result)]).sum().backward()
    return logits.last[:, 0], logits.last_gradient[:, 0]


def test_only_selected_experts_send_gradient_to_their_router_logits():
    for logits, gradient in zip(*logit_gradients(0.0), strict=True):
        assert gradient.nonzero().flatten().tolist() == sorted(by_hand.best(logits, 2))


def test_through_the_entropy_term_every_logit_gets_gradient():
    assert (logit_gradients(1.0)[1] != 0).all()


def test_an_expert_that_no_token_selects_gets_exactly_zero_gradient():
    layer, x = sigma_moe(), with_constant_channel(normal(2, 6, 6))
    set_logits(layer.router, torch.tensor([-1.0, 1.0, -1.0, 1.0, -1.0]).double())
    layer(x, context(2)).y_BSD.square().sum().backward()
    for weight in (layer.experts.up, layer.experts.down):
        assert [bool(norm > 0) for norm in weight.grad.flatten(1).norm(dim=1)] == [False, True, False, True, False]


def test_gradients_of_input_router_and_banks_equal_finite_differences_while_the_selection_stands():
    layer, x = sigma_moe(d_model=4, entropy_weight=1.0), normal(1, 4, 4)
    with torch.no_grad():
        layer.router.weight *= 3
        ranked = layer.router(x[0]).sort(-1, descending=True).values
        assert (ranked[..., 1] - ranked[..., 2]).min() > 1e-3, "a selection would change under the differences"
        assert torch.einsum("td,edf->tef", x[0], layer.experts.up).abs().min() > 1e-4, "a ReLU would switch"
    assert gradients_agree(layer, x, context(1))


def test_the_auxiliary_loss_is_the_weighted_negative_entropy_of_the_mean_router_distribution():
    layer, x = sigma_moe(entropy_weight=0.3), normal(2, 6, 6)
    logits_TE = x.flatten(0, 1) @ layer.router.weight.detach().T
    (loss,) = losses_of(layer(x, context(2)))
    assert loss.item() == pytest.approx(0.3 * by_hand.negative_entropy(logits_TE), rel=1e-13)


def test_a_zero_router_has_the_lowest_auxiliary_loss():
    layer, x = sigma_moe(entropy_weight=0.3), normal(2, 6, 6)
    set_logits(layer.router, 0.0)
    (loss,) = losses_of(layer(x, context(2)))
    assert loss.item() == pytest.approx(-0.3 * math.log(5), rel=1e-15)


def test_weight_zero_takes_no_statistics():
    layer = sigma_moe(entropy_weight=0.0)
    layer.statistics = None  # type: ignore[assignment]
    assert losses_of(layer(normal(1, 3, 6), context(1))) == ()


def test_the_mean_is_taken_by_the_statistics_that_the_layer_was_handed():
    """As if another rank held rows that all go to expert 0."""

    class OneSided:
        def mean(self, rows_NX: Tensor) -> Tensor:
            other = torch.eye(5, dtype=torch.float64)[:1].expand(rows_NX.shape)
            return torch.cat([rows_NX, other]).mean(0)

        def sum(self, rows_NX: Tensor) -> Tensor:
            raise AssertionError("a sum would depend on the number of rows")

    layer, x = sigma_moe(entropy_weight=1.0), normal(2, 6, 6)
    set_logits(layer.router, 0.0)
    layer.statistics = OneSided()
    (loss,) = losses_of(layer(x, context(2)))
    assert loss.item() == pytest.approx(0.6 * math.log(0.6) + 0.4 * math.log(0.1), rel=1e-13)


def test_the_entropy_term_sees_every_expert_whatever_expert_dropout_leaves_out():
    plain, dropping, x = sigma_moe(), sigma_moe(expert_dropout=0.5).train(), normal(2, 6, 6)
    assert torch.equal(*(losses_of(layer(x, context(2)))[0] for layer in (plain, dropping)))


def test_a_token_is_evaluated_alike_whatever_tokens_it_is_batched_with():
    layer, x = sigma_moe(), normal(4, 5, 6)
    together = layer(x, context(4)).y_BSD
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    shuffled = layer(x.flatten(0, 1)[order][None], context(1)).y_BSD[0]
    torch.testing.assert_close(shuffled, together.flatten(0, 1)[order], rtol=0, atol=1e-13)
    alone = torch.stack([layer(token[None, None], context(1)).y_BSD[0, 0] for token in x.flatten(0, 1)])
    torch.testing.assert_close(alone, together.flatten(0, 1), rtol=0, atol=1e-13)


def test_expert_dropout_changes_the_ranking_only():
    """With K = E nothing can be dropped, and neither a gate nor the scale of the rest changes."""
    plain, dropping, x = sigma_moe(top_k=5), sigma_moe(top_k=5).train(), normal(2, 6, 6)
    unchecked = dropping.config.model_copy(update={"expert_dropout": 0.7})  # a config refuses it
    dropping.selection.config = unchecked
    torch.testing.assert_close(dropping(x, context(2)).y_BSD, plain(x, context(2)).y_BSD, rtol=0, atol=1e-13)


def test_experts_are_dropped_with_the_configured_chance():
    """Expert 0 leads by far; expert 1 is chosen when 0 is dropped and 1 is not: p (1 - p)."""
    layer, x = sigma_moe(expert_dropout=0.25, num_experts=2, top_k=1).train(), with_constant_channel(normal(8, 256, 6))
    set_logits(layer.router, torch.tensor([1.0, -1.0]).double())
    share = layer(x, context(8)).reports["mlp"].count_G[1] / 2048
    assert abs(share - 0.1875) < 5 * (0.1875 * 0.8125 / 2048) ** 0.5


def test_under_bfloat16_autocast_the_router_the_entropy_the_weights_and_the_gradients_stay_float32():
    layer, x = sigma_moe(dtype=torch.float32), normal(2, 6, 6, dtype=torch.float32)
    logits = Recorded(layer.router)
    plain = layer(x, context(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = layer(x, context(2))
    assert narrow.y_BSD.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.y_BSD.float(), plain.y_BSD, rtol=0, atol=0.02 * plain.y_BSD.abs().max().item())
    assert logits.last.dtype == torch.float32
    assert torch.equal(*logits.outputs)
    assert torch.equal(losses_of(plain)[0], losses_of(narrow)[0])
    (narrow.y_BSD.float().square().sum() + losses_of(narrow)[0]).backward()
    assert_float32_throughout(layer)


def test_a_rank_without_rows_takes_part_and_gives_none() -> None:
    layer, x = sigma_moe(expert_dropout=0.5).train(), torch.zeros(0, 5, 6, dtype=torch.float64, requires_grad=True)
    result = layer(x, context([]))
    (result.y_BSD.sum() + sum(losses_of(result))).backward()
    assert result.y_BSD.shape == (0, 5, 6)
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())
