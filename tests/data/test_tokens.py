import json

import numpy as np
import pytest
from transformers import CLIPTokenizer

from tests.support.tiny_pipeline import write_tokenizers
from tlcm_jax.data.tokens import tokenize

SHORT, LONG = "red cat", " ".join(["red", "cat", "of", "icon"] * 40)  # 160 tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    write_tokenizers(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizers(folder):
    return [CLIPTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2")]


def padded(tokenizer, texts):
    return tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="np")[
        "input_ids"
    ]


def test_one_chunk_is_what_the_tokenizer_makes(tokenizers):
    texts = [SHORT, "", LONG]
    for tokenizer, ids in zip(tokenizers, tokenize(tokenizers, texts), strict=True):
        np.testing.assert_array_equal(ids, padded(tokenizer, texts))
    first, second = tokenize(tokenizers, [SHORT])
    assert first[0, -1] == tokenizers[0].eos_token_id  # CLIP-L pads with end-of-text,
    assert second[0, -1] == tokenizers[1].convert_tokens_to_ids("!") == 0  # bigG with "!"


def test_chunks_are_prompts_of_75_tokens(tokenizers):
    words = LONG.split()
    pieces = [" ".join(words[i : i + 75]) for i in (0, 75, 150)]
    for tokenizer, ids in zip(
        tokenizers, tokenize(tokenizers, [LONG, SHORT], chunks=None), strict=True
    ):
        assert ids.shape == (2, 3, 77)
        np.testing.assert_array_equal(ids[0], padded(tokenizer, pieces))
        np.testing.assert_array_equal(ids[1], padded(tokenizer, [SHORT, "", ""]))
    cut = tokenize(tokenizers, [LONG], chunks=2)[0]
    np.testing.assert_array_equal(cut[0], padded(tokenizers[0], pieces[:2]))


def test_both_towers_have_as_many_chunks_as_the_longest_text(tokenizers):
    first, second = tokenize(tokenizers, [SHORT], [LONG], chunks=None)
    assert first.shape == second.shape == (1, 3, 77)
    np.testing.assert_array_equal(first[0], padded(tokenizers[0], [SHORT, "", ""]))


def test_a_text_of_75_tokens_fits_one_chunk(tokenizers):
    text = " ".join(["cat"] * 75)
    (ids,) = tokenize(tokenizers[:1], [text], chunks=None)
    np.testing.assert_array_equal(ids, padded(tokenizers[0], [text]))
    assert tokenize(tokenizers[:1], [""], chunks=None)[0].shape == (1, 77)


def test_the_special_tokens_map_says_what_pads(folder, tmp_path):
    """SD 2.x: `tokenizer_config.json` says end-of-text, `special_tokens_map.json` says "!"."""
    for file in (folder / "tokenizer").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    marks = json.loads((tmp_path / "special_tokens_map.json").read_text())
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(marks | {"pad_token": "!"}))
    (ids,) = tokenize([CLIPTokenizer.from_pretrained(tmp_path)], [SHORT])
    assert list(ids[0, 4:]) == [0] * 73


def test_bad_arguments_are_refused(tokenizers):
    with pytest.raises(ValueError, match="two text encoders; this one has one"):
        tokenize(tokenizers[:1], [SHORT], [SHORT])
    with pytest.raises(ValueError, match="1 prompts, but 2 prompts_2"):
        tokenize(tokenizers, [SHORT], [SHORT, LONG])
    with pytest.raises(ValueError, match="chunks = 0"):
        tokenize(tokenizers, [SHORT], chunks=0)
