"""Text from a checkpoint: what the next token sees, how it is drawn, and what the command prints."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.prepare import main as prepare
from data.tokenizer import bytes_tokenizer
from model.context import BatchContext
from parallel.config import ProcessInfo
from train.config import Config
from train.generate import Sampling, Trained, generate, load_run, main, sample
from train.run import run

CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0.0, top_p=1.0, seed=0)
ALONE = ProcessInfo(
    rank=0, world_size=1, local_rank=0, local_world_size=1, master_addr="", master_port=0, launcher="python"
)
MIXERS: dict[str, dict[str, Any]] = {
    "switchhead": {"switchhead": {"num_heads": 2, "head_dim": 8, "num_experts": 3, "top_k": 2}},
    "hsm": {"hsm": {"variant": "matrix"}},
}


@pytest.fixture(scope="module", params=MIXERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps on texts of numbered lines, with characters of two bytes."""
    place = tmp_path_factory.mktemp("generate")
    (place / "text.txt").write_text("".join(f"{number} abcdé\n" for number in range(3000)))
    shards = place / "shards"
    options = ["--out", str(shards), "--tokenizer", "bytes", "--workers", "1", "--document-bytes", "500"]
    assert prepare(["--source", str(place / "text.txt"), *options]) == 0
    values = {
        "run": {"dir": str(place / "run"), "steps": 4, "seed": 3, "device": "cpu"},
        "data": {
            "shards": str(shards / "train"),
            "heldout": str(shards / "heldout"),
            "sequence_length": 16,
            "global_batch_size": 4,
            "streams": 4,
        },
        "model": {"d_model": 16, "num_layers": 2, "mixers": [request.param], "feedforwards": ["dense_mlp"]}
        | {"dense_mlp": {"hidden_dim": 24}, **MIXERS[request.param]},
        "parallel": {"zero_stage": 0},
        "optim": {"lr": 1e-2, "schedule": "constant"},
        "eval": {"max_tokens": 64},
    }
    run(Config.model_validate(values), ALONE)
    return place / "run"


@pytest.fixture
def trained(folder: Path) -> Trained:
    return load_run(folder, device=CPU)


def after(trained: Trained, tokens: list[int]) -> torch.Tensor:
    """Logits after the last of `tokens`, computed on all of them at once."""
    context = BatchContext(torch.zeros(1, dtype=torch.int64), None, seed=0, step=0)
    with torch.no_grad():
        return trained.model(torch.tensor([tokens]), context).logits_BSV[0, -1]


def test_each_token_is_the_likeliest_after_the_prompt_and_those_before(trained: Trained):
    seen = [int(token) for token in trained.tokenizer.encode("abcd")]
    found = list(generate(trained, "abcd", GREEDY, max_tokens=30))
    for token in found:  # longer than a training row of 16
        assert token == int(after(trained, seen).argmax())
        seen.append(token)


def test_an_empty_prompt_begins_a_document_as_the_training_saw_one_begin(trained: Trained):
    """After the end token of another document, which attention then no longer sees."""
    end = trained.tokenizer.end_token
    first, second = list(generate(trained, "", GREEDY, max_tokens=2))
    assert first == int(after(trained, [end]).argmax())
    assert second == int(after(trained, [first]).argmax())


def test_without_a_document_mask_the_prompt_follows_the_end_of_another_document(trained: Trained):
    values = trained.config.model_dump()
    values["data"]["document_mask"] = False
    unmasked = Trained(trained.path, trained.step, Config.model_validate(values), trained.tokenizer, trained.model)
    seen = [trained.tokenizer.end_token, *(int(token) for token in trained.tokenizer.encode("dé"))]
    assert next(generate(unmasked, "dé", GREEDY, max_tokens=1)) == int(after(trained, seen).argmax())


def test_a_text_ends_with_its_document(trained: Trained):
    with torch.no_grad():
        trained.model.get_parameter("output.bias")[trained.tokenizer.end_token] += 1e4
    assert list(generate(trained, "abcd", GREEDY, max_tokens=5)) == []


def test_a_seed_means_a_text(trained: Trained):
    texts = [
        list(generate(trained, "ab", Sampling(temperature=2.0, top_p=1.0, seed=seed), max_tokens=20))
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


@pytest.mark.parametrize(
    ("top_p", "temperature", "expected"),
    [
        (1.0, 1.0, [0.5, 0.3, 0.15, 0.05]),
        (0.75, 1.0, [0.625, 0.375, 0.0, 0.0]),  # 0.5 is not enough, 0.5 + 0.3 is
        (0.5, 1.0, [1.0, 0.0, 0.0, 0.0]),
        (1e-9, 1.0, [1.0, 0.0, 0.0, 0.0]),
        (1.0, 0.5, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
    ],
)
def test_tokens_are_drawn_as_often_as_the_nucleus_says(top_p: float, temperature: float, expected: list[float]):
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log() + 3.0
    generator, draws = torch.Generator().manual_seed(0), 4000
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=0)
    counts = np.bincount([sample(logits, sampling, generator) for _ in range(draws)], minlength=4)[[1, 3, 2, 0]]
    for count, probability in zip(counts, expected, strict=True):
        assert abs(count - draws * probability) <= 5 * (draws * probability * (1 - probability)) ** 0.5


def test_the_command_prints_the_prompt_and_whole_characters(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch
):
    tokens = [int(token) for token in bytes_tokenizer().encode("é!")]
    monkeypatch.setattr("train.generate.generate", lambda *_, **__: iter(tokens))
    assert main(["--run", str(folder), "--prompt", "ol", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert out == "olé!\n"
    assert "step_000004" in err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--top-p", "0"], ["--top-p", "0.0", "1 draws among all"]),
        (["--temperature", "-1"], ["--temperature", "-1.0", "0 takes the likeliest"]),
        (["--run", "nowhere"], ["--run", "nowhere", "no checkpoint"]),
    ],
)
def test_bad_settings_are_one_sentence(folder: Path, arguments, parts, capsys: pytest.CaptureFixture[str]):
    assert main(["--run", str(folder), "--device", "cpu", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(part in line for part in parts), line


def test_another_tokenizer_is_refused(folder: Path, tmp_path: Path):
    original = (folder / "tokenizer.json").read_bytes()
    try:
        text = original.decode().replace('"ignore_merges": false', '"ignore_merges": true')
        (folder / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match="must be the tokenizer of the run"):
            load_run(folder, device=CPU)
    finally:
        (folder / "tokenizer.json").write_bytes(original)
