"""Prompt files and the stream of batches."""

import warnings

import numpy as np
import pytest

from tlcm_jax.data.prompts import PromptStream, read_prompts, warn_truncated


def write(folder, data, name="prompts.txt"):
    path = folder / name
    path.write_bytes(data)
    return path


def test_lines_are_stripped_and_blanks_and_comments_dropped(tmp_path):
    first = write(tmp_path, b"\xef\xbb\xbf# licence: CC0\r\n a cat \r\n\r\n\ta dog\n")
    second = write(tmp_path, "红色的猫\nno. #1 dad\u2028still one\na cat".encode(), "b.txt")
    assert read_prompts([first, second]) == [
        "a cat", "a dog", "红色的猫", "no. #1 dad\u2028still one", "a cat",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("data", "where"),
    [
        (b"a cat\ncaf\xe9\n", "line 2, byte 9 of the file is 0xe9"),
        (b"\xef\xbb\xbfok\n\nx\xff", "line 3, byte 8 of the file is 0xff"),
        ("a cat".encode("utf-16"), "line 1, byte 0 of the file is 0xff"),
    ],
)
def test_other_encodings_are_refused_with_their_place(tmp_path, data, where):
    path = write(tmp_path, data)
    with pytest.raises(ValueError, match=f"prompts.txt is not UTF-8: {where}; save it as UTF-8"):
        read_prompts([path])


def test_missing_and_empty_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.txt does not exist"):
        read_prompts([tmp_path / "gone.txt"])
    good = write(tmp_path, b"a cat", "good.txt")
    for data in (b"", b" \n\n", b"# only a comment\n"):
        with pytest.raises(ValueError, match="prompts.txt has no prompt: write one a line"):
            read_prompts([good, write(tmp_path, data)])
    with pytest.raises(ValueError, match="is a folder"):
        read_prompts([tmp_path])
    with pytest.raises(ValueError, match="no prompt file is given"):
        read_prompts([])
    with pytest.raises(ValueError, match=r"must be a list, got 'a.txt': write \['a.txt'\]"):
        read_prompts("a.txt")


def test_every_epoch_is_a_permutation_and_batches_straddle_epochs():
    prompts = [f"p{i}" for i in range(10)]
    stream = PromptStream(prompts, batch_size=4, seed=3)
    drawn = [prompt for k in range(5) for prompt in stream.batch(k)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == sorted(prompts)
    assert drawn[:10] != drawn[10:] and drawn[:10] != prompts
    assert [stream.prompts[i] for i in stream.indices(2)] == stream.batch(2)


def test_a_batch_depends_on_seed_and_number_alone():
    prompts = [f"p{i}" for i in range(50)]
    stream = PromptStream(prompts, 8, seed=1)
    in_order = [stream.batch(k) for k in range(40)]
    assert [PromptStream(prompts, 8, seed=1).batch(k) for k in (33, 2, 39)] == [
        in_order[k] for k in (33, 2, 39)
    ]
    assert PromptStream(prompts, 8, seed=2).batch(0) != in_order[0]


def test_a_batch_may_be_larger_than_the_file():
    drawn = PromptStream(["a", "b", "c"], batch_size=7, seed=0).batch(1)
    assert len(drawn) == 7 and set(drawn) == {"a", "b", "c"}


def test_processes_share_a_batch_in_order():
    prompts = [f"p{i}" for i in range(20)]
    whole = PromptStream(prompts, 8, seed=5)
    parts = [PromptStream(prompts, 8, 5, rank, 4) for rank in range(4)]
    for k in (0, 7):
        joined = np.concatenate([part.indices(k) for part in parts])
        np.testing.assert_array_equal(joined, whole.indices(k))
    with pytest.raises(ValueError, match="8 prompts cannot be divided among 3 processes"):
        PromptStream(prompts, 8, 5, 0, 3)
    with pytest.raises(ValueError, match="process 4 of 4"):
        PromptStream(prompts, 8, 5, 4, 4)
    with pytest.raises(ValueError, match="no prompts"):
        PromptStream([], 8, 5)


class Words:
    """A tokenizer of words between a start and an end token."""

    def __call__(self, texts, truncation, verbose):
        assert truncation is False and verbose is False
        return {"input_ids": [[0, *range(len(text.split())), 1] for text in texts]}


def test_long_prompts_give_one_warning_that_names_them():
    fits, long = "w " * 75, ["first " * 76, "second " * 80, "third " * 90, "fourth " * 99]
    with pytest.warns(UserWarning) as caught:
        assert warn_truncated([fits, *long, fits], Words()) == 4
    (text,) = [str(warning.message) for warning in caught]
    assert text.startswith("4 prompts have more than 77 tokens and will be truncated: 'first")
    assert "(78 tokens)" in text and "'third" in text and "'fourth" not in text
    assert text.endswith("and 1 more") and len(text) < 400
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert warn_truncated([fits] * 5000, Words()) == 0
