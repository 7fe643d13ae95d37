"""Tokenizers: lossless, deterministic, with the exact number of text bytes of each token."""

import json

import pytest
import tokenizers

from data.tokenizer import END_TOKEN, Tokenizer, bytes_tokenizer, load_tokenizer, train_bpe

TEXTS = [
    "def greet(name):\n    return f'hello {name}'\n" * 20,
    "naïve café, 東京, 🙂🙂, \x00\x7f\t end\r\n",
    "the quick brown fox jumps over the lazy dog " * 20,
    f"a text may spell {END_TOKEN} and go on",
]


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request) -> Tokenizer:
    return bytes_tokenizer() if request.param == "bytes" else train_bpe(TEXTS, vocab_size=300)


@pytest.mark.parametrize("text", [*TEXTS, ""])
def test_decoding_gives_the_text_back_and_token_bytes_add_up_to_it(tokenizer, text):
    ids = tokenizer.encode_document(text)
    assert tokenizer.decode(ids) == text.encode()
    assert tokenizer.token_bytes_V[ids].sum() == len(text.encode())


@pytest.mark.parametrize("text", TEXTS)
def test_only_the_last_id_of_a_document_is_the_end_token(tokenizer, text):
    ids = tokenizer.encode_document(text)
    assert ids[-1] == tokenizer.end_token == 0
    assert tokenizer.end_token not in ids[:-1]
    assert tokenizer.token_bytes_V[tokenizer.end_token] == 0


def test_bytes_are_shifted_by_one():
    tokenizer = bytes_tokenizer()
    assert tokenizer.vocab_size == 257
    assert tokenizer.encode("Aé\n").tolist() == [66, 0xC3 + 1, 0xA9 + 1, 11]


def test_bpe_has_the_wanted_size_and_shortens_text():
    tokenizer = train_bpe(TEXTS, vocab_size=300)
    assert tokenizer.vocab_size == len(tokenizer.token_bytes_V) == 300
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_ids_agree_with_the_library_reading_the_saved_file(tokenizer):
    library = tokenizers.Tokenizer.from_str(tokenizer.to_bytes().decode())
    assert library.encode(TEXTS[1]).ids == tokenizer.encode(TEXTS[1]).tolist()


def test_bpe_of_the_same_texts_is_the_same_whatever_their_order():
    assert train_bpe(TEXTS, vocab_size=300).to_bytes() == train_bpe(TEXTS[::-1], vocab_size=300).to_bytes()


def test_the_identity_survives_saving_and_differs_between_tokenizers(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.to_bytes())
    assert load_tokenizer(tmp_path / "tokenizer.json").tokenizer_id == tokenizer.tokenizer_id
    assert tokenizer.tokenizer_id != train_bpe(TEXTS, vocab_size=299).tokenizer_id


def test_ids_over_65535_need_four_bytes():
    content = json.loads(bytes_tokenizer().to_bytes())
    content["model"]["vocab"]["ab"] = 1 << 16
    assert Tokenizer(json.dumps(content)).encode("abc").dtype == "<u4"
    assert bytes_tokenizer().encode("abc").dtype == "<u2"


def test_more_ids_than_the_text_can_fill_are_refused():
    with pytest.raises(ValueError, match=r"--vocab-size must be at most .* is 400 .* lower"):
        train_bpe(["abc"], vocab_size=400)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content.pop("model"), "must be a Hugging Face tokenizer.json"),
        (lambda content: content.update(decoder={"type": "WordPiece"}), "decoder is WordPiece"),
        (lambda content: content["model"]["vocab"].update({"▁the": 257}), "'▁the'"),
        (
            lambda content: (content["model"]["vocab"].pop(END_TOKEN), content["added_tokens"].clear()),
            "must have the token",
        ),
        (lambda content: content["model"].update(type="Unigram", vocab=[["a", -1.0]]), "its model is Unigram"),
        (lambda content: content["model"].update(type="WordLevel"), "its model is WordLevel"),
        (
            lambda content: content["model"]["vocab"].pop("h"),
            r"each of the 256 bytes, .* none for 1 of them \(byte 104,",
        ),
        (lambda content: content.update(pre_tokenizer={"type": "Whitespace"}), "its pre_tokenizer is Whitespace"),
        (lambda content: content.update(pre_tokenizer=None), "its pre_tokenizer is None"),
        (lambda content: content["model"].update(dropout=0.1), r"no dropout, .* dropout is 0\.1"),
        (lambda content: content["model"].update(end_of_word_suffix="</w>"), "no end_of_word_suffix"),
        (lambda content: content["model"]["vocab"].update(ab="q"), "ids of .* but that of 'ab' is 'q'"),
        (lambda content: content["model"]["vocab"].update(ab=10**12), "but that of 'ab' is 1000000000000"),
    ],
)
def test_a_tokenizer_whose_bytes_or_end_are_unknown_is_refused(change, reason):
    content = json.loads(bytes_tokenizer().to_bytes())
    change(content)
    with pytest.raises(ValueError, match=reason):
        Tokenizer(json.dumps(content))


@pytest.mark.parametrize(
    "asked",
    [
        {"truncation": {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}},
        {
            "padding": {
                "strategy": {"Fixed": 2048},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": END_TOKEN,
            }
        },
    ],
    ids=["truncation", "padding"],
)
def test_a_file_that_asks_for_cut_or_filled_documents_is_used_without(asked):
    plain = train_bpe(TEXTS, vocab_size=300)
    other = Tokenizer(json.dumps(json.loads(plain.to_bytes()) | asked))
    for text in ("short", " ".join(TEXTS) * 20):
        assert other.encode(text).tolist() == plain.encode(text).tolist()
        assert other.decode(other.encode(text)) == text.encode()


def test_a_normalizer_is_used_whether_there_are_merges_or_not():
    lower = {"normalizer": {"type": "Lowercase"}}
    for plain in (bytes_tokenizer(), train_bpe(TEXTS, vocab_size=300)):
        other = Tokenizer(json.dumps(json.loads(plain.to_bytes()) | lower))
        assert other.decode(other.encode("ABC déÉ")) == "abc déé".encode()


def test_a_file_that_is_not_utf_8_is_a_sentence(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"tokenizer\.json must be a tokenizer\.json in UTF-8"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer at .*tokenizer\.json"):
        load_tokenizer(tmp_path / "tokenizer.json")
