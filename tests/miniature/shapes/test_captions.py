"""Captions say their spec, no more and no less, in both languages."""

import pytest

from miniature.shapes.captions import (
    WORDINGS,
    chinese,
    english,
    parse_chinese,
    parse_english,
)
from miniature.shapes.scene import RUNGS, TEST_START, Group, Spec, draw_spec


@pytest.mark.parametrize("wording", range(WORDINGS))
@pytest.mark.parametrize(("write", "read"), [(english, parse_english), (chinese, parse_chinese)])
def test_captions_parse_back(write, read, wording):
    for index in range(TEST_START, TEST_START + 500):
        spec = draw_spec(index, RUNGS["full"])
        assert read(write(spec, wording)) == spec, write(spec, wording)


def test_how_captions_read():
    stars = Group(number=2, size="small", colour="red", shape="star")
    spec = Spec(groups=(stars, Group(shape="circle")), style="flat", ground="dark")
    assert english(spec) == "two small red stars and a circle, flat, on a dark background"
    assert chinese(spec) == "深色背景上的两颗红色小星星和一个圆形，扁平风格"
    orange = Spec(groups=(Group(colour="orange"), Group(shape="moon")), relation="left of")
    assert english(orange, 1) == "an orange shape to the left of a moon"
    assert chinese(orange, 1) == "一个橙色图形在一弯月亮的左侧"
    many = Spec(groups=(Group(number=None, shape="cross"),))
    assert english(many) == "crosses"


@pytest.mark.parametrize("read", [parse_english, parse_chinese])
def test_other_text_is_refused_by_name(read):
    with pytest.raises(ValueError, match="'a purple elephant' is not a noun phrase"):
        read("a purple elephant")
