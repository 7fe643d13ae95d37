"""Where only our kernels compute, the floats that a layer counts are those that it keeps for its backward pass."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention_config import AttentionConfig
from model.hsm.config import HSMConfig
from model.product_key_config import PEERConfig
from model.product_keys import gates_of
from model.section import LayerSection
from tests.model.build import context
from tests.model.test_cost import LENGTH, built, of, row


def numbers_kept(config: LayerSection, run: Callable[[Any, Tensor], object]) -> int:
    """How many wait for the backward pass of `run` on one row of the layer, its weights and input left out."""
    layer, x_BSD = built(config), row().requires_grad_()
    ours = {tensor.untyped_storage().data_ptr() for tensor in (x_BSD, *layer.parameters())}
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        result = run(layer, x_BSD)
    assert result is not None
    return sum(tensor.numel() for place, tensor in kept.items() if place not in ours)


@pytest.mark.parametrize("top_k", [1, 4])
@pytest.mark.parametrize("num_keys", [3, 12])
def test_of_product_keys_the_picks_wait_for_the_backward_pass_and_no_sub_scores(num_keys: int, top_k: int):
    config = PEERConfig(num_experts=num_keys**2, num_heads=2, key_dim=4, top_k=top_k, query_norm="none")

    def route(layer: Any, x_BSD: Tensor) -> tuple[Any, Tensor]:
        choice = layer.router.choose(layer.router(x_BSD[0]).queries_TPZC, top_k=top_k)
        return choice, gates_of(choice.scores_THK, kind="softmax")

    hidden = 2 * top_k * LENGTH  # a number of each expert, after the router
    assert of(config).work.floats - hidden == numbers_kept(config, route)


def test_of_top_k_attention_the_kept_keys_wait_and_no_scores():
    one, three = (AttentionConfig(num_heads=2, head_dim=4, attend_top_k=top_k) for top_k in (1, 3))
    kept = [numbers_kept(config, lambda layer, x_BSD: layer(x_BSD, context(1))) for config in (one, three)]
    assert of(three).work.floats - of(one).work.floats == kept[1] - kept[0] > 0


@pytest.mark.parametrize("variant", ["constant", "vector", "multihead"])
def test_of_shifting_by_factors_nothing_waits(variant: str):
    config = HSMConfig.model_validate({"variant": variant, "num_heads": 2 if variant == "multihead" else None})
    assert of(config).work.floats == numbers_kept(config, lambda layer, x_BSD: layer(x_BSD, context(1))) == 0
