"""Prompts to evaluate on, from COCO's captions and from tables."""

import json

import pytest

from tlcm_jax.data.prompt_sets import PromptSet, read_prompt_set


def test_cocos_captions_are_each_images_first_by_image_id(tmp_path):
    file = tmp_path / "captions_val2017.json"
    annotations = [
        {"image_id": 139, "id": 7, "caption": "A woman \n stands"},
        {"image_id": 9, "id": 90, "caption": "A bowl"},
        {"image_id": 139, "id": 2, "caption": "Another of the same"},
        {"image_id": 1000, "id": 1, "caption": "People"},
    ]
    file.write_text(json.dumps({"images": [], "annotations": annotations}))
    found = read_prompt_set(file)
    assert found.name == "captions_val2017"
    assert found.prompts == ("A bowl", "A woman stands", "People")
    assert found.first(2).prompts == ("A bowl", "A woman stands")
    file.write_text(json.dumps([{"prompt": "a"}]))
    with pytest.raises(ValueError, match="is not COCO's captions"):
        read_prompt_set(file)


def test_a_column_of_a_table(tmp_path):
    table = tmp_path / "prompts.csv"
    table.write_text('id,prompt,caption\n1,"a red cat, sitting",x\n2,an icon,y\n', "utf-8-sig")
    assert read_prompt_set(table).prompts == ("a red cat, sitting", "an icon")
    assert read_prompt_set(f"{table}:caption", "named").prompts == ("x", "y")
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"text": "a red cat", "n": 1}\n\n{"text": "an icon"}\n')
    assert read_prompt_set(f"{lines}:text").prompts == ("a red cat", "an icon")
    assert read_prompt_set(lines).prompts == ("a red cat", "an icon")
    with pytest.raises(ValueError, match="row 1 has no text under 'n'"):
        read_prompt_set(f"{lines}:n")
    lines.write_text('{"text": ')
    with pytest.raises(ValueError, match="is no jsonl file"):
        read_prompt_set(f"{lines}:text")
    with pytest.raises(FileNotFoundError, match="none.csv does not exist"):
        read_prompt_set(tmp_path / "none.csv")
    table.write_text("prompt\n")
    with pytest.raises(ValueError, match="has no column prompt"):
        read_prompt_set(table)


@pytest.mark.parametrize("name", ["../x", "/x", "..", "a/b", "a\0b", "a\n"])
def test_a_name_is_one_of_a_file(name):
    """Images are written under it."""
    with pytest.raises(ValueError, match="its name must be one of a file"):
        PromptSet(name=name, prompts=("a cat",))


def test_mjhq_s_prompts_in_the_file_s_order_with_their_category(tmp_path):
    rows = {
        "b2": {"category": "food", "prompt": " a  pie"},
        "a1": {"category": "art", "prompt": "x"},
    }
    file = tmp_path / "meta_data.json"
    file.write_text(json.dumps(rows))
    found = read_prompt_set(file)
    assert found.prompts == ("a pie", "x")
    assert found.annotations == {"category": ["food", "art"]}
    file.write_text(json.dumps({"b2": ["a pie"]}))
    with pytest.raises(ValueError, match="nor MJHQ-30K's"):
        read_prompt_set(file)
