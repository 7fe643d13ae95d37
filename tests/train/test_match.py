"""`model.match` in a config file: where the number and the vocabulary come from, and what is left of it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from model.parameters import count_parameters
from model.transformer import Transformer
from tests.train.tiny_job import ALONE, tiny_config, write_shards
from train.config import Config, check_resume, load_config, to_yaml
from train.dry_run import dry_run

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs" / "tiny_cpu.yaml"
DENSE = [
    "model.mixers=[attention]",
    "model.feedforwards=[dense_mlp]",
    "model.switchhead=null",
    "model.sigma_moe=null",
    "model.attention.num_heads=4",
    "model.attention.head_dim=32",
    "model.match.by=feedforward_dim",
]
VOCABULARY = "model.vocab_size=4096"


def parameters(config: Config) -> int:
    vocab_size = config.model.vocab_size
    assert vocab_size is not None
    return count_parameters(Transformer(config.model, vocab_size=vocab_size, backend="reference"))


def error_of(*overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_config(TINY, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_dense_twin_of_another_config_is_one_line_and_says_how_near_it_is():
    said: list[str] = []
    twin = load_config(TINY, [*DENSE, VOCABULARY, f"model.match.params_of={TINY}"], say=said.append)
    ours = parameters(load_config(TINY, [VOCABULARY]))
    assert abs(parameters(twin) - ours) <= 1e-3 * ours
    assert twin.model.dense_mlp is not None
    (sentence,) = said
    assert (
        f"model.dense_mlp.hidden_dim is {twin.model.dense_mlp.hidden_dim}: {parameters(twin):,} parameters" in sentence
    )
    assert f"{ours:,}" in sentence


def test_a_number_of_parameters_is_matched_and_what_the_file_says_is_replaced():
    said: list[str] = []
    config = load_config(TINY, [VOCABULARY, "model.match.params=4.7e+6", "model.match.by=experts"], say=said.append)
    assert config.model.sigma_moe is not None
    expert = 4 * (2 * 128 * 64 + 128)
    assert abs(parameters(config) - 4.7e6) <= expert / 2
    assert f"is {config.model.sigma_moe.num_experts} instead of 16: " in said[0]


def test_the_resolved_config_has_the_size_and_no_match_and_a_resume_compares_sizes(tmp_path: Path):
    config = load_config(TINY, [*DENSE, VOCABULARY, "model.match.params=2.5e+6"])
    assert config.model.match is None
    copy = tmp_path / "config.yaml"
    copy.write_text(to_yaml(config))
    said: list[str] = []
    assert load_config(copy, say=said.append) == config
    assert said == []
    assert (
        check_resume(
            config.model_dump(mode="json"), load_config(TINY, [*DENSE, VOCABULARY, "model.match.params=2.5e+6"])
        )
        == []
    )
    with pytest.raises(ValueError, match="hidden_dim was"):
        check_resume(
            config.model_dump(mode="json"), load_config(TINY, [*DENSE, VOCABULARY, "model.match.params=3.0e+6"])
        )


def write(path: Path, config: Config, **changes: Any) -> Path:
    values = config.model_dump(mode="json")
    values["model"] |= changes
    path.write_text(yaml.safe_dump(values))
    return path


def test_the_vocabulary_is_the_shards_where_the_model_has_none(tmp_path: Path):
    write_shards(tmp_path / "shards", seed=1)
    path = write(tmp_path / "config.yaml", tiny_config(tmp_path), match={"params": 20000, "by": "expert_dim"})
    free, given = load_config(path), load_config(path, ["model.vocab_size=257"])
    assert free.model.vocab_size is None
    assert free.model.sigma_moe == given.model.sigma_moe
    expert_channel = 2 * 5 * 8
    assert abs(parameters(given) - 20000) <= expert_channel / 2


def test_the_other_model_counts_with_its_own_vocabulary_or_with_ours(tmp_path: Path):
    base = tiny_config(tmp_path)
    null, hundred = (write(tmp_path / f"{size}.yaml", base, vocab_size=size) for size in (None, 100))
    at = ["model.vocab_size=50", "model.match.by=expert_dim"]
    same = load_config(null, [*at, f"model.match.params_of={null}"])
    assert same.model.sigma_moe == base.model.sigma_moe
    more = load_config(null, [*at, f"model.match.params_of={hundred}"])
    assert more.model.sigma_moe is not None
    assert more.model.sigma_moe.expert_dim == 4 + round(50 * (2 * 8 + 1) / (2 * 5 * 8))


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model.match.params=4.7e+7"], ["model.match.by", "is missing"]),
        (["model.match.by=experts"], ["params or params_of", "params is None"]),
        (["model.match.by=experts", "model.match.params=1.0e+6", "model.match.params_of=x.yaml"], ["one of the two", "x.yaml"]),
        (["model.match.by=experts", "model.match.params=many"], ["model.match.params must be a number", "many"]),
        (["model.match.by=experts", "model.match.params=0"], ["model.match.params must be at least 1", "raise it"]),
        ([VOCABULARY, "model.match.by=experts", "model.match.params=1.0e+6"], ["1,000,000", "ask for more"]),
        ([VOCABULARY, "model.match.by=depth", "model.match.params=1.0e+7"], ["model.match.by", "depth", "d_model"]),
        (["data.shards=nowhere", "model.match.by=experts", "model.match.params=1.0e+7"],
         ["vocab_size is null", "nowhere", "set model.vocab_size", "prepare the shards"]),
        (["model.vocab_size=many", "model.match.by=experts", "model.match.params=1.0e+7"], ["model.vocab_size must be a whole number"]),
        ([VOCABULARY, "model.match.by=experts", "model.match.params_of=nowhere.yaml"], ["no config file nowhere.yaml"]),
        ([VOCABULARY, "model.match.by=experts", "model.match.params=1.0e+7", "model.switchhead.heads=3"],
         ["model.switchhead.heads (3) is not a key"]),
        ([VOCABULARY, "model.match.by=experts", "model.match.params=1.0e+7", "model.switchhead.head_dim=3"], ["head_dim is 3"]),
        ([VOCABULARY, "model.match.by=experts", "model.match.params=1.0e+7", "model.distinct_layers=3"], ["distinct_layers is 3"]),
        (["model.vocab_size=many", "model.match.by=experts", f"model.match.params_of={TINY}"], ["model.vocab_size must be a whole number"]),
    ],
)  # fmt: skip
def test_a_match_that_cannot_be_is_one_sentence_with_the_remedy(overrides: list[str], parts: list[str]):
    message = error_of(*overrides)
    assert all(part in message for part in parts), message


def test_sections_that_are_none_are_one_sentence_too(tmp_path: Path):
    values = tiny_config(tmp_path).model_dump(mode="json")
    values["model"] |= {"sigma_moe": 3, "match": {"params": 1e7, "by": "experts"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values | {"data": 3}))
    with pytest.raises(ValueError, match=r"model\.match counts the embeddings too"):
        load_config(tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=r"data must be a section"):
        load_config(tmp_path / "config.yaml", [VOCABULARY])


def test_a_chain_of_matches_is_refused(tmp_path: Path):
    chained = write(
        tmp_path / "a.yaml", load_config(TINY, [VOCABULARY]), match={"params_of": str(TINY), "by": "experts"}
    )
    assert "name the last of the chain" in error_of(
        VOCABULARY, "model.match.by=experts", f"model.match.params_of={chained}"
    )


def test_a_config_that_was_not_loaded_may_not_ask_for_a_match(tmp_path: Path):
    with pytest.raises(ValueError, match="solved while a config file is loaded"):
        tiny_config(tmp_path, model={"match": {"params": 1e6, "by": "experts"}})


def test_the_dry_run_prints_the_table_as_comments_of_the_resolved_yaml(capsys: pytest.CaptureFixture[str]):
    config = load_config(TINY, [*DENSE, VOCABULARY, "model.match.params=2.5e+6"])
    dry_run(config, ALONE)
    printed = capsys.readouterr().out
    assert Config.model_validate(yaml.safe_load(printed)) == config
    assert f"# parameters: {parameters(config):,}\n" in printed
    (shown,) = [line.split() for line in printed.splitlines() if "0-3" in line and "attention" in line]
    assert shown[:4] == ["#", "0-3", "attention", f"{4 * 4 * 128 * 128:,}"]


def test_only_the_first_process_prints(capsys: pytest.CaptureFixture[str]):
    second = ALONE.model_copy(update={"rank": 1, "local_rank": 1, "world_size": 2, "local_world_size": 2})
    dry_run(load_config(TINY, [VOCABULARY]), second)
    assert capsys.readouterr().out == ""
