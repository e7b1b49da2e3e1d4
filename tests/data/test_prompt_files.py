"""What is read as prompts, and what is refused rather than trained on."""

import gzip
import json

import pytest

from tlcm_jax.data.prompt_sets import read_prompt_set
from tlcm_jax.data.prompts import read_prompts

PARQUET = b"PAR1\x15\x04\x15\x00abc\nPAR1"


def write(folder, name, data):
    (folder / name).write_bytes(data)
    return folder / name


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("unix.txt", b"a fox\na cat\na dog\n"),
        ("windows.txt", b"\xef\xbb\xbfa fox\r\na cat\r\n\r\na dog"),
        ("mac.txt", b"a fox\ra cat\ra dog\r"),
        ("mixed.txt", b"a fox\ra cat\r\na dog\n"),
        ("no suffix", b"# licence: CC0\na fox\n a cat\t\na dog\n"),
        ("a.jsonl", b'{"file_name": "1.png", "text": "a fox"}\n{"text": "a\\ncat"}\n'
                    b'{"text": "a dog", "n": null}\r\n{"text": ""}\n'),
        ("a.ndjson", b'{"caption": "a fox"}\r{"caption": "a cat"}\r{"caption": "a dog"}'),
        ("a.csv", b'image,Caption\n1.png,a fox\n2.png,"a\ncat"\n3.png, a dog \n'),
        ("semicolons.CSV", b"image;prompt\r\n1;a fox\r\n2;a cat\r\n\r\n3;a dog\r\n"),
        ("a.tsv", b"prompt\timage\na fox\t1\na cat\t2\na dog\t3\n"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_forms(tmp_path, name, data, packed):
    path = write(tmp_path, name + ".gz" * packed, gzip.compress(data) if packed else data)
    assert read_prompts([path]) == ["a fox", "a cat", "a dog"]
    assert read_prompt_set(path).prompts == ("a fox", "a cat", "a dog")


def test_the_column_named(tmp_path):
    table = write(tmp_path, "a.csv", b'\xef\xbb\xbfid,prompt,alt\n1,"a fox, snow",x\n2,a cat,y\n')
    assert read_prompts([table, f"{table}:alt"]) == ["a fox, snow", "a cat", "x", "y"]
    lines = write(tmp_path, "a.jsonl", b'{"text": "a fox", "prompt": "x"}\n{"text": "a cat"}')
    assert read_prompts([f"{lines}:text", lines]) == ["a fox", "a cat", "x"]
    packed = write(tmp_path, "b.csv.gz", gzip.compress(table.read_bytes()))
    assert read_prompts([f"{packed}:alt"]) == ["x", "y"]
    with pytest.raises(ValueError, match=r"no column 'much' \(it has id, prompt, alt\).*:COLUMN"):
        read_prompts([f"{table}:much"])
    write(tmp_path, "a.csv", b"image,words\n1.png,a fox\n")
    with pytest.raises(ValueError, match=r"no column prompt or caption or text \(it has image, w"):
        read_prompts([table])
    write(tmp_path, "a.jsonl", b'{"text": "a fox"}\n{"text": 3}\n')
    with pytest.raises(ValueError, match="row 2 has no text under 'text'"):
        read_prompts([lines])


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b'{"file_name": "1.png", "text": "a fox"}\n{"text": "b"}\n', "JSON.*a.jsonl:CO"),
        ("a.txt", b'["a fox"]\n', "JSON, one value a line"),
        ("a.txt", b'"a fox"\n"a \\u2019cat"\n', "JSON, one value a line.*take the quotes off"),
        ("a.txt", b'[\n  "a fox",\n  "a cat"\n]\n', "is one JSON value"),
        ("a.json5", json.dumps({"prompts": ["a"]}, indent=1).encode(), "is one JSON value"),
        ("b.parquet", PARQUET, "is a parquet file; write its caption column"),
        ("b.txt", PARQUET, "is a parquet file"),
        ("u16.txt", "a fox\na cat\n".encode("utf-16-le"), "character 0x00 in line 1 .UTF-16 with"),
        ("u16.csv", "prompt\na cat\n".encode("utf-16-be"), "character 0x00 in line 1 .UTF-16 with"),
        ("a.txt", b"a fox\n\x1b[31ma cat\n", "character 0x1b in line 2 .it is no text"),
        ("a.jsonl", b'{"text": "a\x07"}', "character 0x07"),
        ("a.xlsx", b"PK\x03\x04....", "a zip archive"),
        ("a.txt", b"%PDF-1.7\n", "a PDF"),
        ("a.txt", b"{\\rtf1\\ansi a fox}", "rich text"),
        ("a.txt", b"<!DOCTYPE html>\n<html>", "a web page"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("a.txt.gz", gzip.compress(b"a fox\n" * 99, mtime=0)[:-9], "a damaged gzip file"),
        ("a.gz", gzip.compress(PARQUET, mtime=0), "a parquet file"),
        ("a.gz", gzip.compress(bytes(201 << 20), 1, mtime=0), "unpacks to over 200 MB"),
        ("a.jsonl", b"a fox\n", "is no jsonl file"),
        ("a.jsonl", b"[" * 99999, "is no jsonl file"),
        ("a.jsonl", b"3\n", "is no jsonl file .line 1 is no JSON object"),
        ("a.jsonl", b'{"text": "a \\ud800"}', "half a surrogate pair"),
        ("a.csv", b"prompt\n", "no column prompt"),
        ("a.csv", b"prompt,n\n,3\n", "no prompt in its column 'prompt'"),
        ("a.csv", b"a fox in the snow\na cat\n", "it has a fox in the snow"),
    ],
)  # fmt: skip
def test_what_is_no_text_of_prompts(tmp_path, name, data, message):
    with pytest.raises(ValueError, match=message):
        read_prompts([write(tmp_path, name, data)])


def test_words_that_look_like_json(tmp_path):
    path = write(tmp_path, "a.txt", b'"a quoted fox"\n{a set} of cats\n[brackets] and 3\n42\n')
    assert len(read_prompts([path])) == 4
