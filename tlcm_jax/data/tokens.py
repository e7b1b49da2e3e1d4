"""Prompts to token ids, also prompts longer than the text encoders have positions for.

CLIP's towers read 77 tokens: begin, 75 of text, end. A longer text is cut into chunks of 75
tokens, each of which gets its own begin and end and is encoded on its own; the states are joined
along the token axis (`models.clip_text`). This is what A1111, compel and diffusers' community
pipelines do; the cut falls where it falls, also inside a word. Chunks that a shorter prompt of
the batch does not reach are the empty prompt.
"""

import html
from collections.abc import Sequence
from pathlib import Path

import ftfy
import numpy as np
from transformers import BertTokenizer, CLIPTokenizer, PreTrainedTokenizerBase

from tlcm_jax.io.json_files import read_object

_LARGEST = 16 * 2**20  # bytes of a file; CLIP's tokenizer.json has 2 MB
_SIDE_FILES = (
    "vocab.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip


def tokenize(
    tokenizers: Sequence[PreTrainedTokenizerBase],
    prompts: Sequence[str],
    prompts_2: Sequence[str] | None = None,
    *,
    chunks: int | None = 1,
) -> tuple[np.ndarray, ...]:
    """Token ids for each text encoder.

    Args:
      tokenizers: one for each encoder; each pads as its own folder says.
      prompts: n texts.
      prompts_2: the second encoder's texts, where they differ (diffusers' `prompt_2`): what SDXL's
        bigG reads, and so the pooled embedding.
      chunks: 1 cuts every text at its 77th token; k gives each text k chunks and cuts the rest;
        None gives as many as the longest text needs. Conditional and null conditioning need the
        same number.

    Returns:
      For each tokenizer int32 ids, `[n, 77]` with one chunk, else `[n, chunks, 77]`.

    Raises:
      ValueError: `prompts_2` without a second tokenizer or of another length, or `chunks` below 1.
    """
    if prompts_2 is not None and len(tokenizers) < 2:
        raise ValueError("prompts_2 needs a model with two text encoders; this one has one")
    if prompts_2 is not None and len(prompts_2) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts, but {len(prompts_2)} prompts_2")
    if chunks is not None and chunks < 1:
        raise ValueError(f"chunks = {chunks}: must be at least 1")
    texts = [prompts, *[prompts if prompts_2 is None else prompts_2] * (len(tokenizers) - 1)]
    words = [_words(tokenizer, text) for tokenizer, text in zip(tokenizers, texts, strict=True)]
    if chunks is None:
        chunks = max(
            -(-len(row) // _room(tokenizer)) or 1
            for tokenizer, rows in zip(tokenizers, words, strict=True)
            for row in rows
        )
    return tuple(
        _chunked(tokenizer, rows, chunks) for tokenizer, rows in zip(tokenizers, words, strict=True)
    )


def read_tokenizer(folder: Path, vocabulary: int) -> CLIPTokenizer:
    """The CLIP tokenizer of a folder; its files are read as data, from disk only.

    Args:
      folder: with `vocab.json` or `tokenizer.json`.
      vocabulary: how many tokens the text encoder knows.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it cannot be read, or is another text encoder's.
    """
    if not (folder / "vocab.json").is_file() and not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder} holds no vocab.json; the model folder is not whole")
    if not (folder / "merges.txt").is_file() and not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no merges.txt, without which its vocab.json cuts no text into tokens; "
            "the model folder is not whole"
        )
    for file in sorted(folder.glob("*.*")):
        with file.open("rb") as opened:
            if opened.read(23) == b"version https://git-lfs":
                raise ValueError(f"{file} is a git-lfs pointer, not the file: run `git lfs pull`")
    for file in folder.glob("*"):
        if file.is_file() and file.suffix in (".json", ".txt") and file.stat().st_size > _LARGEST:
            raise ValueError(f"{file} has {file.stat().st_size} bytes, over {_LARGEST}")
        if file.name in _SIDE_FILES:
            read_object(file, "tokenizer")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        ids = tokenizer.get_vocab().values()
        smallest, largest = min(ids), max(ids)
        marks = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        length = int(tokenizer.model_max_length)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # of whatever kind: the library trusts its files, and panics
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{folder} holds no CLIP tokenizer that can be read ({reason})") from None
    if smallest < 0 or largest >= vocabulary or None in marks or length < 3:
        raise ValueError(
            f"{folder} does not go with its text encoder: token ids up to {largest} of a "
            f"vocabulary of {vocabulary}; begin, end, padding {marks}; {length} tokens a text"
        )
    tokenizer.model_max_length = min(length, 77)  # transformers' "unknown" is a huge number
    return tokenizer


def read_bert_tokenizer(file: Path, vocabulary: int) -> BertTokenizer:
    """BERT's tokenizer, without case, of at most so many words; its file is read as data.

    Raises:
      ValueError: it cannot be read, or is another text encoder's.
    """
    try:
        found = BertTokenizer(str(file), do_lower_case=True)
        largest = max(found.get_vocab().values())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # of whatever kind: the library trusts its files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file} is no vocabulary of BERT's ({reason})") from None
    if largest >= vocabulary:
        raise ValueError(f"{file} has ids up to {largest}, and the network {vocabulary} words")
    return found


def _words(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Each prompt's ids without begin and end, uncut."""
    return tokenizer(list(prompts), add_special_tokens=False, truncation=False, verbose=False)[
        "input_ids"
    ]


def _room(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of text in a chunk: all but begin and end."""
    return tokenizer.model_max_length - 2


def _chunked(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]], chunks: int
) -> np.ndarray:
    """Ids `[n, 77]` or `[n, chunks, 77]` of rows without begin and end."""
    length, room = tokenizer.model_max_length, _room(tokenizer)
    ids = np.full((len(rows), chunks, length), tokenizer.pad_token_id, np.int32)
    ids[:, :, 0] = tokenizer.bos_token_id
    for row, places in zip(rows, ids, strict=True):
        for i, place in enumerate(places):
            part = row[i * room : (i + 1) * room]
            place[1 : 1 + len(part)] = part
            place[1 + len(part)] = tokenizer.eos_token_id
    return ids[:, 0] if chunks == 1 else ids


def open_clip_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int
) -> np.ndarray:
    """Token ids as open_clip's tokenizer gives them, int32 `[n, length]`.

    Texts are mended first (broken encodings, HTML entities, white space); one that is too long is
    cut, and ends like the others with the end of text; 0 pads.
    """
    mended = [" ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()) for text in texts]
    ids = np.zeros((len(texts), length), np.int32)
    for row, words in zip(ids, _words(tokenizer, mended), strict=True):
        words = [tokenizer.bos_token_id, *words[: length - 2], tokenizer.eos_token_id]
        row[: len(words)] = words
    return ids


def clip_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int) -> np.ndarray:
    """Token ids as transformers' processors give them, int32 `[n, length]`.

    The tokenizer pads as its own files say.
    """
    found = tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=length, verbose=False
    )
    return np.asarray(found["input_ids"], np.int32)
