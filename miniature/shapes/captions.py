"""Captions of a `Spec` in English and Chinese, three wordings each, and the way back.

    english(spec, 0)  ->  "two small red stars and a circle, flat, on a dark background"
    chinese(spec, 0)  ->  "深色背景上的两颗红色小星星和一个圆形，扁平风格"

`parse_english` and `parse_chinese` return the spec that a caption says, so that a caption never
says more or less than its spec.
"""

import re
from collections.abc import Mapping

from miniature.shapes.scene import (
    COLOURS,
    CONTRASTS,
    FILLS,
    GROUNDS,
    RELATIONS,
    SHAPES,
    SIZES,
    STYLES,
    Group,
    Spec,
)

WORDINGS = 3
_NUMBERS = {2: "two", 3: "three", 4: "four"}
_RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "beneath"),
}
# (before the groups, after them), by wording.
_STYLE_WORDS = (("", ", {}"), ("a {} picture of ", ""), ("", " in {} style"))
_GROUND_WORDS = (("", ", on a {} background"), ("", " on a {} background"), ("{} background: ", ""))


def _noun(group: Group) -> str:
    """The noun phrase without its article or number: "small faint striped red stars"."""
    adjectives = [group.size, group.contrast, group.fill, group.colour]
    noun = group.shape or "shape"
    if group.number != 1:
        noun += "es" if noun == "cross" else "s"
    return " ".join([word for word in adjectives if word] + [noun])


def _phrase(group: Group, wording: int) -> str:
    noun = _noun(group)
    if group.number is None:
        return noun if wording == 0 else f"some {noun}"
    if group.number > 1:
        return f"{_NUMBERS[group.number]} {noun}"
    if wording == 2:
        return f"one {noun}"
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def english(spec: Spec, wording: int = 0) -> str:
    """The caption in one of `WORDINGS` wordings; 0 is the canonical one."""
    phrases = [_phrase(group, wording) for group in spec.groups]
    if spec.relation:
        text = f"{phrases[0]} {_RELATION_WORDS[spec.relation][wording]} {phrases[1]}"
    elif len(phrases) == 3 and wording != 1:
        text = f"{phrases[0]}, {phrases[1]} and {phrases[2]}"
    else:
        text = " and ".join(phrases)
    if spec.style:
        before, after = _STYLE_WORDS[wording]
        text = before.format(spec.style) + text + after.format(spec.style)
        if spec.style[0] in "aeiou" and before:
            text = text.replace("a ", "an ", 1)
    if spec.ground:
        before, after = _GROUND_WORDS[wording]
        text = before.format(spec.ground) + text + after.format(spec.ground)
    return text


_EN_GROUP = re.compile(
    r"^(?:(?P<number>an?|one|two|three|four|some) )?"
    + "".join(
        rf"(?:(?P<{name}>{'|'.join(values)}) )?"
        for name, values in (
            ("size", SIZES),
            ("contrast", CONTRASTS),
            ("fill", FILLS),
            ("colour", COLOURS),
        )
    )
    + rf"(?P<shape>{'|'.join((*SHAPES, 'shape'))})(?:e?s)?$"
)
_EN_NUMBER = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "some": None, None: None}


def _english_group(text: str) -> Group:
    found = _EN_GROUP.match(text)
    if not found:
        raise ValueError(f"caption: {text!r} is not a noun phrase of the shapes world")
    said = found.groupdict()
    said["number"] = _EN_NUMBER[said["number"]]
    if said["shape"] == "shape":
        said["shape"] = None
    return Group(**said)


def parse_english(text: str) -> Spec:
    """The spec of an English caption.

    Raises:
      ValueError: the text is not one of the grammar's captions; what was not understood is named.
    """
    ground = style = None
    for wording in range(WORDINGS):
        for value in GROUNDS:
            text, hit = _without(text, _GROUND_WORDS[wording], value)
            ground = value if hit else ground
        for value in STYLES:
            for article in ("a", "an"):
                before, after = _STYLE_WORDS[wording]
                around = (before.replace("a ", f"{article} ", 1), after)
                text, hit = _without(text, around, value)
                style = value if hit else style
    words = [(word, name) for name in RELATIONS for word in _RELATION_WORDS[name]]
    for word, name in sorted(words, key=lambda pair: -len(pair[0])):
        first, found, second = text.partition(f" {word} ")
        if found:
            groups = (_english_group(first), _english_group(second))
            return Spec(groups=groups, relation=name, style=style, ground=ground)
    groups = tuple(_english_group(part) for part in re.split(r", | and ", text))
    return Spec(groups=groups, style=style, ground=ground)


def _without(text: str, around: tuple[str, str], value: str) -> tuple[str, bool]:
    """The text less the words that name a style or ground, if they are there."""
    before, after = (part.format(value) for part in around)
    if text.startswith(before) and text.endswith(after):
        return text[len(before) : len(text) - len(after)], True
    return text, False


_ZH = {
    "small": "小",
    "large": "大",
    "bold": "鲜明的",
    "faint": "淡淡的",
    "plain": "纯色的",
    "striped": "条纹的",
    "red": "红色",
    "orange": "橙色",
    "yellow": "黄色",
    "green": "绿色",
    "cyan": "青色",
    "blue": "蓝色",
    "purple": "紫色",
    "pink": "粉色",
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "star": "星星",
    "heart": "爱心",
    "cross": "十字",
    "ring": "圆环",
    "moon": "月亮",
    "flat": "扁平",
    "outlined": "描边",
    "soft": "柔和",
    "pixel art": "像素",
    "tinted": "浅色",
    "white": "白色",
    "dark": "深色",
    "grid": "网格",
}
_ZH_NUMBERS = {1: "一", 2: "两", 3: "三", 4: "四", None: "一些"}
_ZH_MEASURE = {"star": "颗", "heart": "颗", "moon": "弯"}
_ZH_SHAPE = "图形"
_ZH_SIDES = {
    "left of": ("左边", "左侧", "左面"),
    "right of": ("右边", "右侧", "右面"),
    "above": ("上方", "上面", "上边"),
    "below": ("下方", "下面", "下边"),
}
_ZH_AND = ("和", "与", "、")
_ZH_STYLE = (("", "，{}风格"), ("{}风格的", ""), ("", "（{}风格）"))
_ZH_GROUND = (("{}背景上的", ""), ("", "，{}背景"), ("{}背景：", ""))


def _zh_phrase(group: Group) -> str:
    said = [_ZH[value] for value in (group.contrast, group.fill, group.colour) if value]
    if group.size:
        said.append(_ZH[group.size])
    measure = "" if group.number is None else _ZH_MEASURE.get(group.shape or "", "个")
    noun = _ZH[group.shape] if group.shape else _ZH_SHAPE
    return _ZH_NUMBERS[group.number] + measure + "".join(said) + noun


def chinese(spec: Spec, wording: int = 0) -> str:
    """The same caption in Chinese, in one of `WORDINGS` wordings."""
    phrases = [_zh_phrase(group) for group in spec.groups]
    if spec.relation:
        text = f"{phrases[0]}在{phrases[1]}的{_ZH_SIDES[spec.relation][wording]}"
    else:
        text = _ZH_AND[wording].join(phrases)
    for value, words in ((spec.style, _ZH_STYLE), (spec.ground, _ZH_GROUND)):
        if value:
            before, after = words[wording]
            text = before.format(_ZH[value]) + text + after.format(_ZH[value])
    return text


def _alternatives(words: Mapping[str, str], values: tuple[str, ...]) -> str:
    return "|".join(words[value] for value in values)


_ZH_GROUP = re.compile(
    r"^(?P<number>一些|一|两|三|四)[个颗弯]?"
    + "".join(
        f"(?P<{name}>{_alternatives(_ZH, values)})?"
        for name, values in (
            ("contrast", CONTRASTS),
            ("fill", FILLS),
            ("colour", COLOURS),
            ("size", SIZES),
        )
    )
    + f"(?P<shape>{_alternatives(_ZH, SHAPES)}|{_ZH_SHAPE})$"
)
_ZH_BACK = {word: value for value, word in _ZH.items()}


def _chinese_group(text: str) -> Group:
    found = _ZH_GROUP.match(text)
    if not found:
        raise ValueError(f"caption: {text!r} is not a noun phrase of the shapes world")
    said = {name: _ZH_BACK.get(word or "") for name, word in found.groupdict().items()}
    numbers = {word: number for number, word in _ZH_NUMBERS.items()}
    return Group(**{**said, "number": numbers[found["number"]]})


def parse_chinese(text: str) -> Spec:
    """The spec of a Chinese caption.

    Raises:
      ValueError: the text is not one of the grammar's captions; what was not understood is named.
    """
    ground = style = None
    for wording in range(WORDINGS):
        for value in GROUNDS:
            text, hit = _without(text, _ZH_GROUND[wording], _ZH[value])
            ground = value if hit else ground
        for value in STYLES:
            text, hit = _without(text, _ZH_STYLE[wording], _ZH[value])
            style = value if hit else style
    for name in RELATIONS:
        for side in _ZH_SIDES[name]:
            found = re.match(rf"^(.+)在(.+)的{side}$", text)
            if found:
                groups = (_chinese_group(found[1]), _chinese_group(found[2]))
                return Spec(groups=groups, relation=name, style=style, ground=ground)
    groups = tuple(_chinese_group(part) for part in re.split("[和与、]", text))
    return Spec(groups=groups, style=style, ground=ground)
