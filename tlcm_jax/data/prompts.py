"""Prompts, and the endless stream of batches drawn from them.

The trainer sees prompts only as text or as numbers of text, so a batch can be encoded on the way
or looked up among embeddings made before.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from tlcm_jax.data.prompt_files import is_table, read_column, read_lines, split_column
from tlcm_jax.data.tfds_sets import is_set, read_texts

# Tokens that CLIP's position table holds, start and end included.
TOKEN_LIMIT = 77


def read_prompts(paths: Sequence[str | os.PathLike]) -> list[str]:
    """Reads prompt files and sets: `data.prompt_files` and `data.tfds_sets` say which.

    White space around a prompt is dropped. Duplicates are kept, they are a weight.

    Args:
      paths: files, in a bucket too (`gs://`), read in order; of a table, `FILE:COLUMN` names its
        column.

    Returns:
      The prompts, at least one from each file.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: no file is given, or one is no file of prompts.
    """
    if isinstance(paths, (str, os.PathLike)):
        raise ValueError(f"prompt files must be a list, got {paths!r}: write [{str(paths)!r}]")
    if not paths:
        raise ValueError("no prompt file is given: name at least one")
    prompts = []
    for given in paths:
        if is_set(given):
            prompts += read_texts(str(given))
        else:
            path, column = split_column(given)
            prompts += read_column(path, column) if is_table(path) else read_lines(path)
    return prompts


class PromptStream:
    """Batches of prompts, without end; batch k is a pure function of (seed, k).

    The stream is the concatenation of epochs, each a permutation of all prompts, cut into
    batches; a batch may straddle two epochs. Resuming needs no state but k.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Sets up the stream.

        Args:
          prompts: the prompts.
          batch_size: prompts a batch, over all processes.
          seed: of the permutations; not negative.
          process_index: which process this is: it gets its slice of every batch.
          process_count: how many processes there are.

        Raises:
          ValueError: no prompts, or a batch that the processes cannot divide.
        """
        if not prompts:
            raise ValueError("no prompts: give at least one")
        if batch_size < 1 or batch_size % process_count:
            raise ValueError(
                f"a batch of {batch_size} prompts cannot be divided among {process_count} "
                f"processes: set it to a multiple of {process_count}"
            )
        if not 0 <= process_index < process_count:
            raise ValueError(f"process {process_index} of {process_count} does not exist")
        self.prompts = tuple(prompts)
        self.batch_size = batch_size
        share = batch_size // process_count
        self._slice = slice(process_index * share, (process_index + 1) * share)
        count = len(self.prompts)

        @lru_cache(maxsize=4)
        def permutation(epoch: int) -> np.ndarray:
            return np.random.default_rng((seed, epoch)).permutation(count)

        self._permutation: Callable[[int], np.ndarray] = permutation

    def indices(self, step: int) -> np.ndarray:
        """Which prompts batch number `step` holds: int64 `[b_local]`, this process's slice."""
        position = np.arange(step * self.batch_size, (step + 1) * self.batch_size)[self._slice]
        epochs, places = np.divmod(position, len(self.prompts))
        return np.array(
            [self._permutation(int(e))[p] for e, p in zip(epochs, places, strict=True)], np.int64
        )

    def batch(self, step: int) -> list[str]:
        """Batch number `step`, this process's slice of it."""
        return [self.prompts[i] for i in self.indices(step)]


def warn_truncated(prompts: Sequence[str], tokenizer: Any, limit: int = TOKEN_LIMIT) -> int:
    """Warns once if prompts have more tokens than the text encoder takes.

    Args:
      prompts: the prompts.
      tokenizer: a transformers tokenizer: `tokenizer(texts)["input_ids"]` are lists of tokens,
        start and end included.
      limit: tokens the encoder takes.

    Returns:
      How many prompts are longer, and so will be truncated.
    """
    long = []
    for start in range(0, len(prompts), 4096):
        chunk = list(prompts[start : start + 4096])
        tokens = tokenizer(chunk, truncation=False, verbose=False)["input_ids"]
        lengths = [len(ids) for ids in tokens]
        long += [(p, n) for p, n in zip(chunk, lengths, strict=True) if n > limit]
    if long:
        named = "; ".join(f"{_shorten(prompt)!r} ({length} tokens)" for prompt, length in long[:3])
        more = f"; and {len(long) - 3} more" if len(long) > 3 else ""
        verb = "prompt has" if len(long) == 1 else "prompts have"
        warnings.warn(
            f"{len(long)} {verb} more than {limit} tokens and will be truncated: {named}{more}",
            stacklevel=2,
        )
    return len(long)


def _shorten(prompt: str, length: int = 60) -> str:
    return prompt if len(prompt) <= length else prompt[: length - 3] + "..."
