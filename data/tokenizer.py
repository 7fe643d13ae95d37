"""Text <-> tokens: the byte tokenizer, byte-level BPE, and how many bytes of text each token stands for.

Every tokenizer is one Hugging Face tokenizer.json whose decoder is ByteLevel, so that a token's bytes are fixed and
bits per byte is exact; the byte tokenizer is such a BPE without merges. Owns no files but that one. Used by
data/prepare.py (training, encoding), data/index.py (sizes, identity) and data/reader.py (shards that hold text).
"""

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

END_TOKEN = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
MAX_IDS = 1 << 24  # tables have a place for each id; the largest vocabularies have 2^18
MIN_VOCAB_SIZE = 257  # every byte, and the end token


class Tokenizer:
    """One tokenizer.json. Build it with `bytes_tokenizer`, `train_bpe` or `load_tokenizer`.

    Public values: `tokenizer_id` (kind, size and content: equal ids mean equal tokens), `vocab_size` (largest id + 1),
    `end_token` (the id that ends every document), `token_bytes_V` (int64, text bytes of each id; 0 for special tokens).
    """

    def __init__(self, specification: str, *, name: str = TOKENIZER_FILE) -> None:
        """Reads a tokenizer.json. Raises ValueError, naming `name`, if it is not byte-level or has no end token."""
        try:
            content = json.loads(specification)
            model = content["model"]
            kind = model.get("type", "BPE" if "merges" in model else None)  # older files do not name it
            if kind != "BPE":
                raise ValueError(f"{name} must be a byte-level BPE, but its model is {kind}: use another tokenizer")
            vocab: dict[str, int] = model["vocab"]
            added = {token["id"]: token for token in content["added_tokens"]}
            decoder = content["decoder"]["type"]
            ids = vocab | {token["content"]: token_id for token_id, token in added.items()}
            _check_bpe(content, name)
            _check_ids(ids, name)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{name} must be a Hugging Face tokenizer.json with a ByteLevel decoder, but reading it fails: "
                f"{error!r}"
            ) from error
        if decoder != "ByteLevel":
            raise ValueError(
                f"{name} must have a ByteLevel decoder, so that each token's bytes are fixed, but its decoder is "
                f"{decoder}"
            )
        if END_TOKEN not in ids:
            raise ValueError(
                f"{name} must have the token {END_TOKEN}, which ends every document: add it to the tokenizer's special "
                "tokens"
            )
        self._canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, indent=0) + "\n"
        self._text_of_id = _texts(vocab, added, name)
        self.end_token = ids[END_TOKEN]
        self.vocab_size = max(self._text_of_id) + 1
        self.token_bytes_V = np.array(
            [len(self._text_of_id.get(token_id, b"")) for token_id in range(self.vocab_size)], dtype=np.int64
        )
        self._merges = bool(model.get("merges"))
        special = all(token["special"] for token in added.values())
        self._is_table = not self._merges and special and content.get("normalizer") is None
        digest = hashlib.sha256(self._canonical.encode()).hexdigest()
        self.tokenizer_id = f"{'bpe' if self._merges else 'bytes'}-{self.vocab_size}-{digest[:16]}"

    @property
    def dtype(self) -> np.dtype:
        """The narrowest unsigned type that holds every id."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, without an end token. The end token's name inside a text is ordinary text."""
        if self._is_table:  # one lookup per byte, 1,000 times the library's speed
            return self._id_of_byte[np.frombuffer(text.encode(), dtype=np.uint8)]
        return np.array(self._library.encode(text, add_special_tokens=False).ids, dtype=self.dtype)

    def encode_document(self, text: str) -> np.ndarray:
        """Token ids of `text` and the end token."""
        return np.append(self.encode(text), self.dtype.type(self.end_token))

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes that the ids stand for. Special tokens stand for none."""
        return b"".join(self._text_of_id.get(int(token_id), b"") for token_id in ids)

    def to_bytes(self) -> bytes:
        """The content of tokenizer.json, the same for equal tokenizers."""
        return self._canonical.encode()

    @cached_property
    def _library(self) -> tokenizers.Tokenizer:
        library = tokenizers.Tokenizer.from_str(self._canonical)
        library.no_truncation()  # a saved file may ask for both: each document would be cut, or filled up
        library.no_padding()
        library.encode_special_tokens = True  # a text that spells the end token must not end its document
        return library

    @cached_property
    def _id_of_byte(self) -> np.ndarray:
        table = np.zeros(256, dtype=self.dtype)
        for token_id, text in self._text_of_id.items():
            if len(text) == 1:
                table[text[0]] = token_id
        return table


def bytes_tokenizer() -> Tokenizer:
    """One token per byte: the end token is 0, byte b is b + 1."""
    vocab = {END_TOKEN: 0} | {character: byte + 1 for byte, character in enumerate(_byte_alphabet())}
    library = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    library.add_special_tokens([END_TOKEN])
    return _finish(library, use_regex=False)


def train_bpe(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Byte-level BPE of `vocab_size` ids (the end token and the 256 bytes among them), a function of the texts alone.

    Raises ValueError if the texts do not hold enough different pieces to fill the vocabulary.
    """
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    tokenizer = _finish(library, use_regex=True)
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(
            f"--vocab-size must be at most what the text can fill, but it is {vocab_size} and the training text gives "
            f"{tokenizer.vocab_size} tokens: lower --vocab-size or add text"
        )
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads a tokenizer.json. Raises ValueError if there is none, or none that this module can use."""
    if not path.is_file():
        raise ValueError(f"there is no tokenizer at {path}: put the tokenizer.json that goes with the shards there")
    try:
        return Tokenizer(path.read_text(encoding="utf-8"), name=str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a tokenizer.json in UTF-8, but reading it fails: {error}") from error
    except OSError as error:
        raise RuntimeError(
            f"the tokenizer {path} cannot be read ({error.strerror}): restore it, or correct its permissions"
        ) from error


def _finish(library: tokenizers.Tokenizer, *, use_regex: bool) -> Tokenizer:
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    library.decoder = decoders.ByteLevel()
    return Tokenizer(library.to_str())


def _byte_alphabet() -> list[str]:
    """How byte-level vocabularies write each byte: itself where it prints, else a character from 256 on (GPT-2)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _check_bpe(content: dict[str, Any], name: str) -> None:
    """Everything that the bytes of a text go through must keep them, and the same way each time."""
    model = content["model"]
    missing = [byte for byte, character in enumerate(_byte_alphabet()) if character not in model["vocab"]]
    if missing:
        raise ValueError(
            f"{name} must have a token for each of the 256 bytes, so that no text is lost, but it has none for {len(missing)} of them "
            f"(byte {missing[0]}, ...): use another tokenizer"
        )
    steps: dict[str, Any] = content.get("pre_tokenizer") or {"type": None}
    kinds = [step["type"] for step in steps.get("pretokenizers", [steps])]
    if "ByteLevel" not in kinds:
        raise ValueError(
            f"{name} must have a ByteLevel pre_tokenizer, so that each byte finds its token, but its pre_tokenizer is "
            f"{' and '.join(map(str, kinds))}: use another tokenizer"
        )
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(
                f"the model of {name} must have no {key}, so that equal texts have equal tokens and each token its bytes, but {key} is "
                f"{model[key]!r}: set it to null, or use another tokenizer"
            )


def _check_ids(ids: dict[str, int], name: str) -> None:
    wrong = next(
        (token for token, token_id in ids.items() if type(token_id) is not int or not 0 <= token_id < MAX_IDS), None
    )
    if wrong is not None:
        raise ValueError(
            f"the ids of {name} must be whole numbers from 0 to {MAX_IDS - 1}, but that of {wrong!r} is {ids[wrong]!r}: restore it"
        )


def _texts(vocab: dict[str, int], added: dict[int, dict[str, Any]], name: str) -> dict[int, bytes]:
    """The bytes of each id. An added token is itself, a special one nothing."""
    byte_of_character = {character: byte for byte, character in enumerate(_byte_alphabet())}
    texts = {}
    for token, token_id in vocab.items():
        try:
            texts[token_id] = (
                bytes(byte_of_character[character] for character in token) if token_id not in added else b""
            )
        except KeyError as error:
            raise ValueError(
                f"{name} must be byte-level, but its token {token!r} has the character {error} that stands for no byte"
            ) from None
    for token_id, token in added.items():
        texts[token_id] = b"" if token["special"] else token["content"].encode()
    return texts
