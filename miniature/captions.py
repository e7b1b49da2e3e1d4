"""Captions that name an object and a style: `a 3D render of a red apple`."""

import re

from miniature.splits import rank

# Words a person understands, distinct per style.
STYLE_WORDS = {
    "fluent-3d": "3D render",
    "noto": "Noto emoji",
    "fluent-flat": "flat icon",
    "twemoji": "Twemoji sticker",
}
# The first is the canonical one, used where a pair has one caption only.
TEMPLATES = (
    "a {style} of {object}",
    "{object}, drawn as a {style}",
    "{bare}, {style}",
)
_WORDING = (0, 0, 1, 2)  # template of a training prompt, drawn by hash
_HEAD_ENDS = re.compile(r" (?:with|in|of|on|and|for|from|to|over|behind|holding|without)\b|[,(]")
_SPOKEN_WITH_VOWEL = set("AEFHILMNORSX")  # letters whose names begin with a vowel sound
_CONSONANT_SOUND = ("uni", "use", "uk", "ur", "eu", "ew", "one")
_NO_ARTICLE_ENDING = re.compile(r"(?<![suio'])s$")


def _plain(label: str) -> str:
    """The label as one would type it: straight quotes, single spaces."""
    for curly, straight in (("’", "'"), ("‘", "'"), ("“", '"'), ("”", '"')):
        label = label.replace(curly, straight)
    return " ".join(label.split())


def _with_article(label: str) -> str:
    head = _HEAD_ENDS.split(label, maxsplit=1)[0]
    if ":" in label or _NO_ARTICLE_ENDING.search(head):  # `flag: France`, `grapes`
        return label
    word = re.split(r"[^\w]", label, maxsplit=1)[0]
    if len(word) == 1 or (word.isupper() and len(word) <= 3 and word not in ("UP", "NO")):
        vowel = word[:1] in _SPOKEN_WITH_VOWEL
    else:
        lower = label.lower()
        vowel = lower.startswith(tuple("aeiou8")) and not lower.startswith(_CONSONANT_SOUND)
        vowel = vowel or lower.startswith("hour")
    return f"{'an' if vowel else 'a'} {label}"


def wording(hexcode: str, style: str) -> int:
    """Which template a pair has where it has one caption only, and not the canonical one."""
    return _WORDING[rank(f"wording {style}", hexcode) % len(_WORDING)]


def captions(label: str, style: str) -> tuple[str, ...]:
    """All captions of one (object, style) pair, the canonical one first.

    Args:
      label: English label, as emojibase has it.
      style: a key of `STYLE_WORDS`.

    Raises:
      KeyError: an unknown style.
    """
    words = STYLE_WORDS[style]
    bare = _plain(label)
    return tuple(
        template.format(style=words, object=_with_article(bare), bare=bare)
        for template in TEMPLATES
    )
