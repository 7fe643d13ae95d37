"""The table of a model: its lines add up to the model, and its text says both countings where they differ."""

from typing import Any

from model.attention_config import AttentionConfig
from model.cost import Cost
from model.cost_table import Line, model_table, table_text
from model.parameters import count_parameters
from model.section import LayerSection
from model.transformer import Transformer
from tests.model.build import VOCABULARY, model_config

LENGTH = 16


def table(**changes: Any) -> tuple[Transformer, dict[str, Line]]:
    """Two kinds of mixers and of feed-forwards, by kind."""
    model = Transformer(model_config(**changes), vocab_size=VOCABULARY, backend="reference")
    return model, {line.kind: line for line in model_table(model, length=LENGTH)}


def known(line: Line) -> Cost:
    assert line.cost is not None
    return line.cost


def cost(model: Transformer, kind: str) -> Any:
    section = getattr(model.config, kind)
    return section.cost(model.config.places(backend="reference")[0], length=LENGTH)


def test_the_parameters_of_the_lines_are_those_of_the_model():
    model, lines = table(num_layers=5)
    assert list(lines) == ["embedding", "switchhead", "attention", "sigma_moe", "dense_mlp", "norms", "output"]
    assert sum(line.parameters for line in lines.values()) == count_parameters(model)
    assert lines["embedding"].parameters == VOCABULARY * 8
    assert lines["output"].parameters == VOCABULARY * 8 + VOCABULARY
    assert lines["norms"].parameters == (2 * 5 + 1) * 2 * 8
    assert lines["attention"].parameters == sum(
        count_parameters(model.get_submodule(f"layers.{depth}.mixer")) for depth in (1, 3)
    )


def test_layers_of_a_kind_stand_together_and_their_costs_add_up():
    model, lines = table(
        num_layers=6, mixers=["switchhead", "switchhead", "attention"], feedforwards=["dense_mlp", "sigma_moe"]
    )
    assert lines["switchhead"].layers == "0-1,3-4"
    assert lines["attention"].layers == "2,5"
    assert lines["sigma_moe"].layers == "1,3,5"
    one, four = cost(model, "switchhead"), known(lines["switchhead"])
    assert (four.active_parameters, four.decode_floats) == (4 * one.active_parameters, 4 * one.decode_floats)
    assert (four.work.macs, four.work.floats) == (4 * one.work.macs, 4 * one.work.floats)
    assert four.papers_work.macs == 4 * one.papers_work.macs


def test_the_embedding_gives_a_row_and_the_output_multiplies():
    _, lines = table()
    embedding, output, norms = (known(lines[name]) for name in ("embedding", "output", "norms"))
    assert (embedding.active_parameters, embedding.work.macs) == (8, 0)
    assert (output.active_parameters, output.work.macs, output.work.floats) == (
        VOCABULARY * 9,
        LENGTH * VOCABULARY * 8,
        LENGTH * VOCABULARY,
    )
    assert norms.active_parameters == lines["norms"].parameters


def test_weights_that_are_used_again_are_stored_once_and_work_each_time():
    model, shared = table(num_layers=6, distinct_layers=2)
    _, own = table(num_layers=6)
    assert sum(line.parameters for line in shared.values()) == count_parameters(model)
    for kind in ("switchhead", "sigma_moe"):
        assert shared[kind].layers == own[kind].layers == "0,2,4"
        assert 3 * shared[kind].parameters == own[kind].parameters
        assert shared[kind].cost == own[kind].cost
    assert shared["norms"].cost == own["norms"].cost


def test_an_hsm_layer_keeps_its_own_shift():
    hsm = {"mixers": ["hsm"], "hsm": {}, "switchhead": None, "attention": None}
    _, lines = table(num_layers=4, **hsm)
    assert known(lines["hsm"]).decode_floats == (1 + 2 + 4 + 8) * 8


def test_a_table_that_several_layers_share_counts_once():
    peer = {"num_experts": 16, "num_heads": 1, "top_k": 2, "key_dim": 4, "shared_experts": True}
    only = {"feedforwards": ["peer"], "sigma_moe": None, "dense_mlp": None}
    model, lines = table(num_layers=3, peer=peer, **only)
    assert sum(line.parameters for line in lines.values()) == count_parameters(model)
    keys = 8 * 4 + 2 * 4 + 4 * 4
    assert lines["peer"].parameters == 2 * 16 * 8 + 3 * keys


def test_the_text_says_both_countings_where_they_differ_and_one_where_they_do_not():
    _, lines = table()
    text = table_text(list(lines.values()), length=LENGTH)
    header, *_ = text.splitlines()
    assert header.split() == [
        "layers",
        "kind",
        "parameters",
        "active",
        "MACs",
        "papers'",
        "floats",
        "papers'",
        "decode",
        "state",
    ]
    switchhead = known(lines["switchhead"])
    assert switchhead.work.macs != switchhead.papers_work.macs
    per_token = [
        switchhead.work.macs,
        switchhead.papers_work.macs,
        switchhead.work.floats,
        switchhead.papers_work.floats,
    ]
    (shown,) = [line.split() for line in text.splitlines() if "switchhead" in line.split()[1:2]]
    assert shown == [
        "0",
        "switchhead",
        f"{lines['switchhead'].parameters:,}",
        f"{switchhead.active_parameters:,}",
        *[f"{number // LENGTH:,}" for number in per_token],
        f"{switchhead.decode_floats:,}",
    ]
    assert "floats: results of products and softmax, but of what only our kernels compute what is kept" in text
    assert "floats written" not in text
    assert "one layer of switchhead on a row: " in text
    assert "one layer of attention" not in text

    _, plain = table(mixers=["attention"], feedforwards=["dense_mlp"], switchhead=None, sigma_moe=None)
    assert "papers'" not in table_text(list(plain.values()), length=LENGTH)


def test_the_sentence_of_a_layer_has_the_figures_that_the_papers_print():
    """SwitchHead 47M, k = 2: 170.4M and 0.76M in the papers' counting."""
    settings = {"num_heads": 2, "head_dim": 76, "num_experts": 5, "top_k": 2, "positions": "xl", "memory_blocks": 1}
    only = {"mixers": ["switchhead"], "attention": None}
    model = Transformer(model_config(d_model=412, switchhead=settings, **only), vocab_size=9, backend="reference")
    text = table_text(model_table(model, length=256), length=256)
    assert (
        "one layer of switchhead on a row: 239.5M MACs and 1.11M floats; by the papers' formulas 170.4M and 0.76M"
        in text
    )


def test_a_kind_that_does_not_tell_its_cost_has_dashes(monkeypatch: Any):
    monkeypatch.setattr(AttentionConfig, "cost", LayerSection.cost)
    _, lines = table()
    assert lines["attention"].cost is None
    rows = [line.split() for line in table_text(list(lines.values()), length=LENGTH).splitlines()]
    attention, whole = (next(row for row in rows if name in row[:2]) for name in ("attention", "all"))
    assert attention == ["1", "attention", f"{lines['attention'].parameters:,}", *["-"] * 6]
    assert whole[1:] == [f"{sum(line.parameters for line in lines.values()):,}", *["-"] * 6]
