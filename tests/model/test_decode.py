"""Decoding token by token against the whole text at once, in float64: every mixer, from an empty and from a filled cache."""

from typing import Any

import pytest
import torch

from model.context import BatchContext, Memory
from model.decode import Decoder
from tests.model.build import context, model_config, tokens, transformer

LENGTH = 13
ATTENTION = {"num_heads": 4, "head_dim": 6}
SWITCHHEAD = {"num_heads": 2, "head_dim": 6, "num_experts": 3, "top_k": 2}
HSM = {"variant": "matrix"}

# Without memory: every earlier token stays visible.
MIXERS: dict[str, dict[str, Any]] = {
    "attention": {"attention": ATTENTION},
    "attention_xl": {"attention": ATTENTION | {"positions": "xl"}},
    "attention_no_positions": {"attention": ATTENTION | {"positions": "none"}},
    "grouped_queries": {"attention": ATTENTION | {"num_kv_heads": 2}},
    "top_k": {"attention": ATTENTION | {"attend_top_k": 3, "attend_chunk": 4}},
    "switchhead": {"switchhead": SWITCHHEAD},
    "switchhead_xl": {"switchhead": SWITCHHEAD | {"positions": "xl"}},
    "switchhead_qkvo": {"switchhead": SWITCHHEAD | {"experts": ["q", "k", "v", "o"]}},
    "switchhead_top_k": {"switchhead": SWITCHHEAD | {"attend_top_k": 3, "attend_chunk": 5}},
    "hsm": {"hsm": HSM},
    "hsm_own_shifts": {"hsm": {"variant": "multihead", "num_heads": 2, "head_shifts": "own"}},
    "hybrid": {"hsm": HSM, "switchhead": SWITCHHEAD},
}
# With memory: what is visible ends where a row of training ends.
WITH_MEMORY: dict[str, dict[str, Any]] = {
    "attention_xl": {"attention": ATTENTION | {"positions": "xl", "memory_blocks": 1}},
    "attention_two_blocks": {"attention": ATTENTION | {"memory_blocks": 2}},
    "switchhead_xl": {"switchhead": SWITCHHEAD | {"positions": "xl", "memory_blocks": 1}},
    "switchhead_rope": {"switchhead": SWITCHHEAD | {"memory_blocks": 2}},
    "top_k": {"attention": ATTENTION | {"memory_blocks": 1, "attend_top_k": 3, "attend_chunk": 2}},
    "hybrid": {"hsm": HSM, "switchhead": SWITCHHEAD | {"memory_blocks": 1}},
    "unequal": {"switchhead": SWITCHHEAD | {"memory_blocks": 2}, "attention": ATTENTION | {"memory_blocks": 1}},
}


def network(sections: dict[str, Any], **changes: Any) -> Any:
    absent = {"switchhead": None, "attention": None}
    return transformer(model_config(mixers=list(sections), **(absent | sections), **changes))


def decode(model: Any, rows_BS: torch.Tensor, ends: list[int], *, block_length: int) -> torch.Tensor:
    """Logits from pieces that end at `ends`."""
    decoder = Decoder(model, block_length=block_length)
    pieces = []
    for first, last in zip([0, *ends], ends, strict=False):
        pieces.append(decoder.extend(rows_BS[:, first:last]))
        assert decoder.length == last
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("ends", [[*range(1, LENGTH + 1)], [5, 6, 9, LENGTH]], ids=["by_token", "in_pieces"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_decoding_equals_the_whole_text(mixer: str, ends: list[int]):
    model, rows = network(MIXERS[mixer]), tokens(2, LENGTH)
    whole = model(rows, context(2)).logits_BSV
    torch.testing.assert_close(decode(model, rows, ends, block_length=LENGTH), whole, rtol=1e-11, atol=1e-11)


def row_by_row(model: Any, text_BX: torch.Tensor, *, length: int) -> torch.Tensor:
    """Logits of rows of `length` that each see the memory of the rows before, as training computes them."""
    inputs: dict[int, list[torch.Tensor]] = {}
    logits = []
    for number, row_BS in enumerate(text_BX.split(length, dim=1)):
        blocks = model.config.memory_blocks()
        states = {}
        for depth, count in blocks.items():
            past = torch.cat([torch.zeros(len(text_BX), count * length, 8).double(), *inputs.get(depth, [])], dim=1)
            states[depth] = past[:, -count * length :]
        filled_B = torch.full((len(text_BX),), number * length)
        facts = BatchContext(torch.zeros(len(text_BX), dtype=torch.int64), None, 0, 0, Memory(states, filled_B))
        output = model(row_BS, facts)
        logits.append(output.logits_BSV)
        for depth in blocks:
            inputs.setdefault(depth, []).append(output.layer_inputs[depth])
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("ends", [[*range(1, 21)], [7, 8, 20]], ids=["by_token", "in_pieces"])
@pytest.mark.parametrize("mixer", WITH_MEMORY)
def test_decoding_with_memory_equals_the_rows_of_training(mixer: str, ends: list[int]):
    """Five rows of four tokens: more than any memory holds, so it is left behind too."""
    model, text = network(WITH_MEMORY[mixer]), tokens(2, 20)
    expected = row_by_row(model, text, length=4)
    torch.testing.assert_close(decode(model, text, ends, block_length=4), expected, rtol=1e-11, atol=1e-11)
    forgetful = network(WITH_MEMORY[mixer])(text[:, 16:], context(2)).logits_BSV
    assert (expected[:, 16:] - forgetful).abs().max() > 1e-4  # memory does something here


def test_decoding_leaves_no_gradient_and_no_training_mode():
    model = network(MIXERS["switchhead"]).train()
    logits = Decoder(model, block_length=8).extend(tokens(1, 3))
    assert not logits.requires_grad
    assert not model.training


def test_keys_and_values_grow_with_the_text_and_memory_and_rings_do_not():
    """Floats per row: 2 layers of K and V of 4 heads of 6; at most C + 1 rows of 4 with memory; shifts 1 and 2 of width 8."""

    def held(sections: dict[str, Any]) -> list[int]:
        decoder = Decoder(network(sections), block_length=4)
        floats = []
        for token in tokens(1, 20).split(1, dim=1):
            decoder.extend(token)
            floats.append(decoder.num_floats)
        return floats

    per_position = 2 * 2 * 4 * 6
    assert held(MIXERS["attention"]) == [per_position * seen for seen in range(1, 21)]
    assert held(MIXERS["grouped_queries"]) == [per_position // 2 * seen for seen in range(1, 21)]
    visible = [min(seen, 4 + (seen - 1) % 4 + 1) for seen in range(1, 21)]
    assert held(WITH_MEMORY["attention_xl"]) == [per_position * number for number in visible]
    assert held(MIXERS["hsm"])[2:] == [(1 + 2) * 8] * 18
