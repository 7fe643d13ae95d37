"""The command that writes text with a trained model: `python -m train.generate --run DIR --prompt "..."`.

Owns the sampling and the streaming of text. The model comes from train/trained.py, the arithmetic of one token after another from
model/decode.py. One process.
"""

import argparse
import codecs
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.decode import Decoder
from train.engine import autocast
from train.trained import Trained, load_run


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. temperature 0 takes the likeliest; top_p: only among the likeliest that together reach it."""

    temperature: float
    top_p: float
    seed: int

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or 1e-3 <= self.temperature < math.inf):
            raise ValueError(
                f"--temperature must be 0 or at least 0.001, but it is {self.temperature}: 0 takes the likeliest token"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p must be above 0 and at most 1, but it is {self.top_p}: 1 draws among all tokens")
        if not 0 <= self.seed < 2**63:
            raise ValueError(
                f"--seed must be at least 0 and below 2**63, but it is {self.seed}: choose a smaller number"
            )


def generate(trained: Trained, prompt: str, sampling: Sampling, *, max_tokens: int) -> Iterator[int]:
    """Tokens after `prompt`, one at a time, up to the end token (not given) or `max_tokens`.

    The tokens see what those of a training row saw: where attention stayed inside documents, nothing before the prompt; elsewhere
    the end token of a document before it.
    """
    device = next(trained.model.parameters()).device
    generator = torch.Generator().manual_seed(sampling.seed)
    given = [int(token) for token in trained.tokenizer.encode(prompt)]
    end = trained.tokenizer.end_token
    decoder = _decoder(trained)
    first = given if trained.config.mask_documents and given else [end, *given]
    with autocast(device, getattr(torch, trained.config.run.dtype)):
        logits_V = decoder.extend(torch.tensor([first], device=device))[0, -1]
        if trained.config.mask_documents and not given:
            decoder = _decoder(trained)  # the document begins with what comes now
        for _ in range(max_tokens):
            token = sample(logits_V, sampling, generator)
            if token == end:
                return
            yield token
            logits_V = decoder.extend(torch.tensor([[token]], device=device))[0, -1]


def sample(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id, drawn in float64 on the CPU so that a seed means the same text on every device that gives the same logits."""
    logits_V = logits_V.detach().to("cpu", torch.float64)
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    probability_V, token_V = (logits_V / sampling.temperature).softmax(0).sort(descending=True, stable=True)
    before_V = probability_V.cumsum(0) - probability_V
    probability_V = probability_V.masked_fill(before_V >= sampling.top_p, 0.0)  # the likeliest always stays
    return int(token_V[torch.multinomial(probability_V, 1, generator=generator)])


def _decoder(trained: Trained) -> Decoder:
    return Decoder(trained.model, block_length=trained.config.data.sequence_length)


def parse_arguments(command_line: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m train.generate", description="Write text with the newest checkpoint of a run."
    )
    add = parser.add_argument
    add("--run", required=True, type=Path, metavar="DIR", help="the run's folder (run.dir), or an export")
    add("--prompt", default="", metavar="TEXT", help="what the text begins with (default: the start of a document)")
    add("--max-tokens", type=int, default=200, metavar="N", help="tokens to write at most (default: 200)")
    add("--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest token (default: 0.8)")
    add(
        "--top-p",
        type=float,
        default=0.95,
        metavar="P",
        help="draw among the likeliest that together reach P (default: 0.95)",
    )
    add("--seed", type=int, default=0, help="the same seed writes the same text (default: 0)")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(command_line)


def main(command_line: Sequence[str] | None = None) -> int:
    """The command: prints the prompt and the text as it comes; 0 when done, 1 or 2 with one sentence when it cannot."""
    args = parse_arguments(command_line)
    try:
        sampling = Sampling(args.temperature, args.top_p, args.seed)
        _check_text(args)
        trained = load_run(args.run, device=torch.device(args.device))
        print(f"{trained.path}, after {trained.step} steps:", file=sys.stderr)
        _stream(trained, args.prompt, sampling, max_tokens=args.max_tokens)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except BrokenPipeError:  # the reader has seen enough; Python would complain again when it closes the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _check_text(args: argparse.Namespace) -> None:
    if args.max_tokens < 1:
        raise ValueError(
            f"--max-tokens must be at least 1, but it is {args.max_tokens}: give the number of tokens to write"
        )
    if any("\ud800" <= character <= "\udfff" for character in args.prompt):
        raise ValueError("--prompt must be text in UTF-8, but some of its bytes are not: check the terminal's encoding")


def _stream(trained: Trained, prompt: str, sampling: Sampling, *, max_tokens: int) -> None:
    characters = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may be spread over tokens
    print(prompt, end="", flush=True)
    for token in generate(trained, prompt, sampling, max_tokens=max_tokens):
        print(characters.decode(trained.tokenizer.decode([token])), end="", flush=True)
    print(characters.decode(b"", final=True))


if __name__ == "__main__":
    sys.exit(main())
