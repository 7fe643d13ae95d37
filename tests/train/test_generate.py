"""Text from a checkpoint: what the next token sees, how it is drawn, and what the command prints."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.prepare import main as prepare
from data.tokenizer import bytes_tokenizer
from model.context import BatchContext, Memory
from model.decode import Decoder
from parallel.config import ProcessInfo
from train.config import Config
from train.evaluate import main as evaluate_main
from train.evaluate import score
from train.generate import Sampling, generate, main, sample
from train.run import run
from train.trained import Trained, load_run

CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0.0, top_p=1.0, seed=0)
ALONE = ProcessInfo(
    rank=0, world_size=1, local_rank=0, local_world_size=1, master_addr="", master_port=0, launcher="python"
)
MIXERS: dict[str, dict[str, Any]] = {
    "switchhead": {"switchhead": {"num_heads": 2, "head_dim": 8, "num_experts": 3, "top_k": 2}},
    "hsm": {"hsm": {"variant": "matrix"}},
}
WITH_MEMORY = {"attention": {"num_heads": 2, "head_dim": 8, "positions": "xl", "memory_blocks": 1}}


@pytest.fixture(scope="module", params=MIXERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory.mktemp("generate"), MIXERS[request.param])


@pytest.fixture(scope="module")
def folder_with_memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory.mktemp("generate"), WITH_MEMORY)


def trained_run(place: Path, mixer: dict[str, Any], *, dtype: str = "float32") -> Path:
    """The folder of a run of four steps on texts of numbered lines, with characters of two bytes."""
    (place / "text.txt").write_text("".join(f"{number} abcdé\n" for number in range(3000)))
    shards = place / "shards"
    options = ["--out", str(shards), "--tokenizer", "bytes", "--workers", "1", "--document-bytes", "500"]
    assert prepare(["--source", str(place / "text.txt"), *options]) == 0
    values = {
        "run": {"dir": str(place / "run"), "steps": 4, "seed": 3, "device": "cpu", "dtype": dtype},
        "data": {
            "shards": str(shards / "train"),
            "heldout": str(shards / "heldout"),
            "sequence_length": 16,
            "global_batch_size": 4,
            "streams": 4,
        },
        "model": {"d_model": 16, "num_layers": 2, "mixers": [*mixer], "feedforwards": ["dense_mlp"]}
        | {"dense_mlp": {"hidden_dim": 24}, **mixer},
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


def test_an_empty_prompt_begins_a_document_as_the_training_saw_one_begin(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
):
    """After the end token of another document, which attention then no longer sees."""
    drawn: list[torch.Tensor] = []

    def first_of_all(logits_V: torch.Tensor, *_: Any) -> int:
        drawn.append(logits_V)
        return 5

    monkeypatch.setattr("train.generate.sample", first_of_all)
    list(generate(trained, "", GREEDY, max_tokens=2))
    end = trained.tokenizer.end_token
    torch.testing.assert_close(drawn[0], after(trained, [end]))
    torch.testing.assert_close(drawn[1], after(trained, [5]))
    assert not torch.allclose(drawn[1], after(trained, [end, 5]))


def test_with_memory_a_token_sees_what_a_training_row_saw(folder_with_memory: Path):
    """Its own row of 16 and the row before it, of a text of three rows: not the first of all."""
    trained = load_run(folder_with_memory, device=CPU)
    text = [trained.tokenizer.end_token, *(int(token) for token in trained.tokenizer.encode("12 abcdé\n" * 6))][:45]
    found = next(generate(trained, trained.tokenizer.decode(text[1:]).decode(), GREEDY, max_tokens=1))
    inputs: list[dict[int, torch.Tensor]] = []
    with torch.no_grad():
        for first in range(0, 45, 16):
            states = inputs[-1] if inputs else {depth: torch.zeros(1, 16, 16) for depth in range(2)}
            memory = Memory(states, torch.tensor([16 * len(inputs)]))
            context = BatchContext(torch.zeros(1, dtype=torch.int64), None, 0, 0, memory)
            output = trained.model(torch.tensor([text[first : first + 16]]), context)
            inputs.append(output.layer_inputs)
    assert found == int(output.logits_BSV[0, -1].argmax())
    decoded = Decoder(trained.model, block_length=16).extend(torch.tensor([text]))
    torch.testing.assert_close(decoded[0, -1], output.logits_BSV[0, -1], rtol=1e-4, atol=1e-4)
    endless = Decoder(trained.model, block_length=1000).extend(torch.tensor([text]))
    assert not torch.allclose(endless[0, -1], output.logits_BSV[0, -1], rtol=1e-4, atol=1e-4)


def test_the_decoder_of_a_run_has_the_rows_of_its_training(folder_with_memory: Path, monkeypatch: pytest.MonkeyPatch):
    trained, lengths = load_run(folder_with_memory, device=CPU), []

    class Watched(Decoder):
        def __init__(self, model: Any, *, block_length: int) -> None:
            lengths.append(block_length)
            super().__init__(model, block_length=block_length)

    monkeypatch.setattr("train.generate.Decoder", Watched)
    list(generate(trained, "ab", GREEDY, max_tokens=1))
    assert lengths == [16]


def test_a_run_in_bfloat16_writes_in_bfloat16(tmp_path: Path):
    trained = load_run(trained_run(tmp_path, MIXERS["switchhead"], dtype="bfloat16"), device=CPU)
    seen: list[torch.dtype] = []
    trained.model.output.register_forward_hook(lambda *_: seen.append(_[-1].dtype))
    list(generate(trained, "ab", GREEDY, max_tokens=2))
    assert set(seen) == {torch.bfloat16}


def test_an_evaluation_of_a_saved_run_is_the_runs_own(folder_with_memory: Path, capsys: pytest.CaptureFixture[str]):
    last = json.loads((folder_with_memory / "metrics.jsonl").read_text().splitlines()[-1])
    assert evaluate_main(["--run", str(folder_with_memory), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert f"loss {last['heldout_loss']:.4f} nats per token, {last['heldout_bits_per_byte']:.4f} bits per byte" in said
    assert "64 tokens" in said


def test_an_evaluation_of_a_saved_run_has_the_memory_that_it_is_asked_for(folder_with_memory: Path):
    trained = load_run(folder_with_memory, device=CPU)
    heldout = trained.config.data.heldout
    as_trained, one, four = (
        score(trained, device=CPU, heldout=heldout, max_tokens=400, memory_blocks=blocks).loss
        for blocks in (None, 1, 4)
    )
    assert as_trained == one
    assert abs(one - four) > 1e-6


def test_memory_is_not_asked_of_a_model_without(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert evaluate_main(["--run", str(folder), "--device", "cpu", "--memory-blocks", "4"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "eval.memory_blocks is for mixers with memory" in line


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
    tokens = [int(token) for token in bytes_tokenizer().encode("é!")] + [0xFF + 1]  # the last is no character
    monkeypatch.setattr("train.generate.generate", lambda *_, **__: iter(tokens))
    assert main(["--run", str(folder), "--prompt", "ol", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert out == "olé!\ufffd\n"
    assert "step_000004" in err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--top-p", "0"], ["--top-p", "0.0", "1 draws among all"]),
        (["--temperature", "-1"], ["--temperature", "-1.0", "0 takes the likeliest"]),
        (["--run", "nowhere"], ["--run", "nowhere", "no checkpoint"]),
        (["--temperature", "nan"], ["--temperature", "nan"]),
        (["--temperature", "1e-320"], ["--temperature", "at least 0.001"]),
        (["--seed", "99999999999999999999"], ["--seed", "below 2**63"]),
        (["--max-tokens", "-3"], ["--max-tokens", "-3"]),
        (["--prompt", "\udcff"], ["--prompt", "UTF-8"]),
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
