"""Every wrong value in a config becomes one sentence: the dotted key, what was given, what it must be, what to change."""

from pathlib import Path

import pytest

from train.config import Config, load_config
from train.config_errors import fields, sections

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny_cpu.yaml"


def error_of(*overrides: str, text: str | None = None, folder: Path | None = None) -> str:
    path = TINY
    if text is not None and folder is not None:
        path = folder / "wrong.yaml"
        path.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        # unknown keys: the nearest valid one, also in another section
        ("optim.lrr=3", ["optim.lrr (3)", "not a key", "nearest valid key is optim.lr", "given as 0.001"]),
        ("model.num_layer=3", ["nearest valid key is model.num_layers", "given as 4"]),
        ("model.expert_backed=loop", ["model.expert_backed (the text 'loop')", "write model.expert_backend"]),
        ("data.batch_size=3", ["nearest valid key is data.global_batch_size", "16"]),
        ("lr=3", ["lr (3)", "nearest valid key is optim.lr"]),
        ("prallel.ep_size=2", ["prallel (a section)", "nearest valid key is parallel"]),
        ("optim.learning_rate=3", ["optim.learning_rate (3)", "remove it; optim takes optimizer, lr, betas"]),
        ("quux=3", ["quux (3)", "the config takes run, data, model, parallel, optim"]),
        # types are strict
        ("run.steps='\"400\"'", ["run.steps must be a whole number", "the text '\"400\"'"]),
        ('run.steps="400"', ["run.steps must be a whole number", "the text '400'", "write 400 without quotes"]),
        ("run.steps=4.5", ["run.steps must be a whole number", "4.5"]),
        ("run.steps=yes", ["run.steps must be a whole number", "true"]),
        ("run.steps=", ["run.steps must be a whole number", "null"]),
        ("run.dir=12", ["run.dir must be text", "12", "--set 'run.dir=\"12\"'"]),
        ("model.recompute=1", ["model.recompute must be true or false", "1"]),
        ("model.mixers=switchhead", ["model.mixers must be a list", "[switchhead]"]),
        ("run=null", ["run must be a section", "null"]),
        # numbers that YAML takes for text
        ("optim.lr=1e-3", ["optim.lr must be a number", "the text '1e-3'", "write 1.0e-3"]),
        ("optim.lr=47.0e6", ["the text '47.0e6'", "write 47.0e+6"]),
        ("run.steps=1e3", ["run.steps must be a whole number", "the text '1e3'", "write 1000"]),
        # bounds and choices
        ("run.steps=0", ["run.steps must be at least 1", "is 0", "raise"]),
        ("model.dropout=1", ["model.dropout must be below 1", "is 1", "lower"]),
        ("optim.lr=.nan", ["optim.lr must be a finite number", "nan"]),
        ("run.dir=''", ["run.dir must not be empty"]),
        ("run.dtype=bf16", ["run.dtype must be float32 or bfloat16", "'bf16'", "write bfloat16"]),
        ("model.mixers=[switchead]", ["model.mixers must name kinds", "names switchead", "write switchhead"]),
        ("model.mixers=[]", ["model.mixers must have 1 or more entries", "[]"]),
        ("optim.betas=[0.9]", ["optim.betas", "too few", "[0.9]"]),
        ("optim.betas=[0.9, 0.9, 0.9]", ["optim.betas must have 2 or fewer entries"]),
        ("optim.betas=[0.9, 1.0]", ["optim.betas[1] must be below 1", "is 1.0"]),
        ("parallel.ep_size=two", ["parallel.ep_size must be a whole number or auto", "'two'"]),
        ("parallel.ep_size=0", ["parallel.ep_size must be at least 1 or auto", "is 0"]),
        ("data.document_mask=maybe", ["data.document_mask must be auto, true or false", "'maybe'"]),
    ],
)
def test_a_wrong_value_is_one_sentence_with_key_value_and_remedy(override: str, parts: list[str]) -> None:
    message = error_of(override)
    assert all(part in message for part in parts), message


def test_the_sentence_begins_with_where_the_value_was_written(tmp_path: Path) -> None:
    assert error_of("optim.lr=1e-3").startswith("--set optim.lr=1e-3: ")
    text = TINY.read_text().replace("lr: 1.0e-3", "lr: 1e-3")
    assert error_of(text=text, folder=tmp_path).startswith(f"{tmp_path / 'wrong.yaml'}: ")


def test_several_errors_are_one_sentence_about_the_first_in_the_file(tmp_path: Path) -> None:
    text = (
        TINY.read_text()
        .replace("keep: 3", "keep: none")
        .replace("steps: 400", "steps: many")
        .replace("lr: 1", "lrr: 1")
    )
    message = error_of(text=text, folder=tmp_path)
    assert "run.steps must be a whole number, but it is the text 'many'" in message
    # optim.lr, which the misspelling leaves missing, comes last
    assert message.endswith("(and 3 more to correct: optim.lrr, checkpoint.keep, optim.lr)")


def test_a_misspelt_key_is_not_also_reported_as_missing(tmp_path: Path) -> None:
    message = error_of(text=TINY.read_text().replace("d_model: 128", "d_modle: 128"), folder=tmp_path)
    assert "model.d_modle (128) is not a key of the config, the nearest valid key is model.d_model" in message
    assert "more to correct" not in message


def test_a_missing_key_and_a_missing_section_are_named(tmp_path: Path) -> None:
    assert "the key model.d_model is missing" in error_of(
        text=TINY.read_text().replace("  d_model: 128\n", ""), folder=tmp_path
    )
    before, _, after = TINY.read_text().partition("data:\n")
    message = error_of(text=before + "model:\n" + after.partition("model:\n")[2], folder=tmp_path)
    assert "the section data is missing: add it with shards, heldout" in message


def test_a_whole_number_is_a_number() -> None:
    assert load_config(TINY, ["optim.lr=1"]).optim.lr == 1.0


def test_fields_and_sections_follow_the_classes() -> None:
    keys = [key for key, _ in fields(Config)]
    assert keys[:2] == ["run.dir", "run.steps"]
    assert "model.sigma_moe.entropy_weight" in keys
    assert len(keys) == len(set(keys))
    assert sections(Config)[""] == ["run", "data", "model", "parallel", "optim", "checkpoint", "eval", "watch"]
    assert sections(Config)["checkpoint"] == ["every_steps", "keep", "asynchronous", "on_failure", "timeout_s"]
