"""The mixer: one layer against a loop, and what a stack of layers may see, carry on and cost."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.hsm.config import HSMConfig
from tests.model.build import context, gradients_agree, losses_of, normal, place
from tests.model.hsm import by_hand
from tests.model.hsm.build import ALL, OWN_SHIFTS, VARIANTS, WIDTH, Stack, hsm, stack, stirred

LENGTH = 40
BOUNDARIES = pytest.mark.parametrize("boundary", ["zero", "self", "clamp"])
EVERY_VARIANT = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
EVERY_LAYER = pytest.mark.parametrize("settings", ALL.values(), ids=ALL)
DOCUMENTS = torch.tensor([[5] * 7 + [2] * 11 + [9] * 4, [1] * 22])


class Sizes(TorchDispatchMode):
    """Every operation inside the block, with the number of elements of each tensor that it wrote, or of which it made a view."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        self.largest = 0  # tensor that was written

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.calls.append((str(func), tuple(made)))
        if not func.is_view:
            self.largest = max([self.largest, *made])
        return result


@EVERY_LAYER
@BOUNDARIES
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one_document", "documents"])
def test_the_layer_equals_its_equations_position_by_position(
    settings: dict[str, Any], boundary: str, documents: Tensor | None
):
    layer = stirred(hsm(settings | {"boundary": boundary}, depth=2))
    weights = {name: weight.detach() for name, weight in layer.mixing.named_parameters()}
    u = normal(2, 22, WIDTH)
    result = layer(u, context(2, documents_BS=documents))
    for row in range(2):
        expected = by_hand.hsm(
            u[row],
            [4, 8, 1] if settings in OWN_SHIFTS.values() else [4],
            variant=settings["variant"],
            weights=weights,
            boundary=boundary,
            documents=None if documents is None else documents[row].tolist(),
        )
        torch.testing.assert_close(result.y_BSD[row], expected, rtol=0, atol=1e-12)
    assert losses_of(result) == ()
    assert dict(result.reports) == {}


@EVERY_LAYER
def test_gradients_of_input_and_weights_equal_finite_differences(settings: dict[str, Any]):
    layer = stirred(hsm(settings, depth=1))
    assert gradients_agree(layer, normal(1, 4, WIDTH), context(1))


@EVERY_VARIANT
def test_the_receptive_field_is_the_sum_of_the_shifts_and_the_token_itself_and_never_the_future(
    settings: dict[str, Any],
):
    model = stack(settings)
    x = normal(1, LENGTH, WIDTH).requires_grad_()
    y = model(x)
    weights = normal(LENGTH, WIDTH, seed=9)  # a plain sum would be blind to what a norm takes out
    for t in (0, 7, 15, 16, 31, LENGTH - 1):
        (gradient,) = torch.autograd.grad((y[0, t] * weights[t]).sum(), x, retain_graph=True)
        seen = gradient[0].abs().amax(dim=1).nonzero().flatten().tolist()
        assert seen == list(range(max(0, t - Stack.REACH), t + 1))


@EVERY_VARIANT
def test_the_probe_without_norm_and_residual_gives_one_at_every_distance_of_the_reach_and_zero_beyond(
    settings: dict[str, Any],
):
    y = impulse = torch.zeros(1, LENGTH, WIDTH, dtype=torch.float64)
    impulse[0, 3] = 1 + normal(WIDTH).abs()
    for depth in range(4):
        # gates of zeros halve the sum
        y = as_sum(settings, depth=depth)(y, context(1)).y_BSD * (2 if "gate" in settings["variant"] else 1)
    assert_all_ones_within_reach(y, impulse, first=3)


@pytest.mark.parametrize("variant", ["constant", "vector", "multihead", "matrix_scalar"])
def test_with_the_residual_on_the_probe_with_factors_zero_and_one_has_one_path_per_distance_too(variant: str):
    y = impulse = torch.zeros(1, LENGTH, WIDTH, dtype=torch.float64)
    impulse[0, 3] = 1 + normal(WIDTH).abs()
    for depth in range(4):
        layer = as_sum(VARIANTS[variant], depth=depth)
        torch.nn.init.zeros_(layer.mixing.of_token.weight)
        y = y + layer(y, context(1)).y_BSD
    assert_all_ones_within_reach(y, impulse, first=3)


def assert_all_ones_within_reach(y_BSD: Tensor, impulse_BSD: Tensor, *, first: int) -> None:
    expected = torch.zeros_like(y_BSD[0])
    expected[first : first + Stack.REACH + 1] = 1.0
    torch.testing.assert_close(y_BSD[0] / impulse_BSD[0, first], expected, rtol=0, atol=1e-12)


def as_sum(settings: dict[str, Any], *, depth: int) -> Any:
    """A layer with weights that make m = u + v, or half of it for gates."""
    layer = hsm(settings | ({"hidden_dim": 2 * WIDTH} if settings["variant"] == "fusion" else {}), depth=depth)
    eye = torch.eye(WIDTH, dtype=torch.float64)
    ones = {"of_token.weight": torch.ones(1), "of_shifted.weight": torch.ones(1)}
    values = {
        "matrix_scalar": ones | {"of_token.weight": eye},
        "matrix": {"of_token.weight": eye, "of_shifted.weight": eye},
        "multihead_matrix": {"of_token.weight": torch.eye(2), "of_shifted.weight": torch.eye(2)},
        "single_gate": {"gate.weight": torch.zeros(1)},
        "double_gate": {"gate.weight": torch.zeros(1)},
        # gelu(x) - gelu(-x) = x
        "fusion": {"up.weight": torch.cat([eye, -eye]).repeat(1, 2), "down.weight": torch.cat([eye, -eye], dim=1)},
    }.get(settings["variant"], ones)
    with torch.no_grad():
        for name, value in values.items():
            layer.mixing.get_parameter(name).copy_(value)
    return layer


def changed(model: Any, x_BSD: Tensor, position: int) -> list[int]:
    """Positions whose output changes with the token at `position`: by a random vector, because a norm removes a constant one."""
    other_BSD = x_BSD.clone()
    other_BSD[0, position] += normal(WIDTH, seed=77)
    return (model(other_BSD) - model(x_BSD))[0].abs().amax(dim=1).nonzero().flatten().tolist()


def test_the_factors_one_and_zero_let_no_tokens_meet():
    model = stack(VARIANTS["constant"])
    for block in model.blocks:
        torch.nn.init.ones_(block.mixer.mixing.of_token.weight)
        torch.nn.init.zeros_(block.mixer.mixing.of_shifted.weight)
    assert changed(model, normal(1, LENGTH, WIDTH), 5) == [5]


@EVERY_VARIANT
def test_a_shift_of_the_whole_row_or_more_lets_no_tokens_meet(settings: dict[str, Any]):
    for depth in (3, 4):  # shifts 8 and 16
        layer = stirred(hsm(settings, depth=depth, num_layers=5))
        assert changed(lambda x, layer=layer: layer(x, context(1)).y_BSD, normal(1, 8, WIDTH), 2) == [2]


@EVERY_VARIANT
def test_a_changed_token_changes_the_outputs_of_the_reach_and_no_others(settings: dict[str, Any]):
    assert changed(stack(settings), normal(1, LENGTH, WIDTH), 6) == list(range(6, 6 + Stack.REACH + 1))


@EVERY_VARIANT
@BOUNDARIES
def test_tokens_before_the_row_move_the_outputs_and_change_none_beyond_the_reach(
    settings: dict[str, Any], boundary: str
):
    model = stack(settings | {"boundary": boundary})
    x, before = normal(1, LENGTH, WIDTH), normal(1, 9, WIDTH, seed=4)
    y, moved = model(x), model(torch.cat([before, x], dim=1))[:, 9:]
    torch.testing.assert_close(moved[:, Stack.REACH :], y[:, Stack.REACH :], rtol=0, atol=1e-12)
    assert (moved - y)[0, : Stack.REACH].abs().amax(dim=1).min() > 1e-6


@EVERY_LAYER
@BOUNDARIES
def test_packed_documents_equal_the_documents_run_alone(settings: dict[str, Any], boundary: str):
    model = stack(settings | {"boundary": boundary})
    x = normal(2, 22, WIDTH)
    packed = model(x, documents_BS=DOCUMENTS)
    alone = torch.cat([model(part) for part in x[:1].split([7, 11, 4], dim=1)], dim=1)
    torch.testing.assert_close(packed[:1], alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(packed[1:], model(x[1:]), rtol=0, atol=1e-12)


@EVERY_LAYER
@BOUNDARIES
@pytest.mark.parametrize(
    "chunks", [[1] * 40, [3, 1, 20, 2, 1, 13], [12, 1, 1, 1, 9, 16]], ids=["tokens", "mixed", "filled"]
)
@torch.no_grad()
def test_decoding_equals_the_parallel_forward(settings: dict[str, Any], boundary: str, chunks: list[int]):
    model = stack(settings | {"boundary": boundary})
    x = normal(2, LENGTH, WIDTH)
    caches = model.new_caches()
    parts = [model(part, caches=caches) for part in x.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(x), rtol=0, atol=1e-12)
    assert {cache.length for cache in caches} == {LENGTH}


@EVERY_VARIANT
@torch.no_grad()
def test_the_decode_state_is_the_sum_of_the_shifts_times_the_width_however_many_tokens_were_seen(
    settings: dict[str, Any],
):
    model = stack(settings)
    caches = model.new_caches()
    assert sum(cache.num_floats for cache in caches) == 0
    for length in (1, 50, 50):
        model(normal(1, length, WIDTH), caches=caches)
        assert sum(cache.num_floats for cache in caches) == Stack.REACH * WIDTH


@pytest.mark.parametrize("settings", OWN_SHIFTS.values(), ids=OWN_SHIFTS)
@torch.no_grad()
def test_heads_with_their_own_shifts_keep_no_more_than_each_needs(settings: dict[str, Any]):
    layer = hsm(settings, depth=1)
    cache = layer.new_cache(block_length=1)
    layer(normal(1, 3, WIDTH), context(1), cache)
    assert cache.num_floats == (2 + 4 + 8) * WIDTH // 3


@EVERY_LAYER
@torch.no_grad()
def test_a_decoded_token_costs_the_same_after_ten_and_after_a_thousand(settings: dict[str, Any]):
    model = stack(settings)
    caches = model.new_caches()
    token = normal(1, 1, WIDTH)
    model(normal(1, 10, WIDTH), caches=caches)
    with Sizes() as after_ten:
        model(token, caches=caches)
    model(normal(1, 989, WIDTH), caches=caches)
    assert caches[0].length == 1000
    with Sizes() as after_a_thousand:
        model(token, caches=caches)
    assert after_ten.calls == after_a_thousand.calls
    # the new token, the earlier one, the block's hidden state of 8, the mixing function's of at most twice the width: no whole ring
    assert after_ten.largest <= 2 * WIDTH


@EVERY_LAYER
@BOUNDARIES
@pytest.mark.parametrize("packed", [False, True], ids=["one_document", "documents"])
def test_training_makes_no_object_over_pairs_of_positions(settings: dict[str, Any], boundary: str, packed: bool):
    layer = stirred(hsm(settings | {"boundary": boundary}, depth=3))
    largest = []
    for length in (512, 1024):
        documents = torch.arange(length)[None] // 100 if packed else None
        x = normal(1, length, WIDTH).requires_grad_()
        with Sizes() as sizes:
            layer(x, context(1, documents_BS=documents)).y_BSD.sum().backward()
        largest.append(sizes.largest)
    assert largest[0] <= 2 * 512 * WIDTH  # [u; v], or both gates
    assert largest[1] == 2 * largest[0]


@EVERY_LAYER
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_under_bfloat16_autocast_the_output_has_the_inputs_dtype_and_weights_and_gradients_stay_float32(
    settings: dict[str, Any], dtype: torch.dtype
):
    layer = stirred(hsm(settings, depth=1)).float()
    x = normal(2, 9, WIDTH).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x, context(2)).y_BSD
    assert y.dtype == dtype
    y.float().sum().backward()
    assert {p.dtype for p in layer.parameters()} | {p.grad.dtype for p in layer.parameters()} == {torch.float32}
    torch.testing.assert_close(y.float(), layer(x.float(), context(2)).y_BSD, rtol=0.05, atol=0.05)


def test_documents_of_cached_tokens_are_not_known_and_refused():
    layer = hsm(VARIANTS["constant"])
    facts = context(1, documents_BS=torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="a cache and document ids are given: leave out the document ids"):
        layer(normal(1, 3, WIDTH), facts, layer.new_cache(block_length=3))


def test_heads_must_divide_the_width():
    config = HSMConfig(variant="multihead", num_heads=4)
    with pytest.raises(ValueError, match=r"num_heads must divide .* num_heads is 4 and d_model is 6: change one"):
        config.build(place("hsm", d_model=6))


def test_the_layer_of_a_hybrid_shifts_by_its_slot():
    mixers = ("hsm", "attention", "hsm")
    assert HSMConfig().build(place(*mixers, depth=2)).shifts == (2,)
    assert HSMConfig(hybrid_shift="skip").build(place(*mixers, depth=2)).shifts == (4,)
