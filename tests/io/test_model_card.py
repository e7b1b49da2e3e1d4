"""Names of recipes and teachers stay text in the card, whatever they hold."""

import ast

import pytest

from tlcm_jax.io.model_card import Recipe, model_card

HOSTILE = [
    '"); import os; os.system("x',
    "a\n```\n<script>alert(1)</script>",
    "x` [y](javascript:z) | # ![](http://u)",
    "\u202e\x00\x1b[31m",
    "a\n---\nlicense: mine",
]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("product", ["lora", "kohya", "unet", "pipeline", "single-file"])
def test_a_name_becomes_no_markup_and_no_code(name, product):
    recipe = Recipe(
        name=name,
        teacher=name,
        method="TLCM",
        times={4: (999, 749, 499, 124)},
        stages=(f"first: {name}",),
        trained=name,
        licence=name,
        ingredients=(name,),
    )
    plain = Recipe(name="x", teacher="x", method="TLCM", times={4: (999, 749, 499, 124)},
                   stages=("first: x",), trained="x", licence="x", ingredients=("x",))  # fmt: skip
    card, expected = model_card(recipe, product), model_card(plain, product)
    assert card.count("\n") == expected.count("\n")  # no line of its own
    assert card.count("```") == 2
    outside = card.split("```python\n")[0] + card.split("```\n")[-1]
    prose = "".join(part for i, part in enumerate(outside.split("`")) if i % 2 == 0)
    assert "<" not in prose and "](" not in prose
    assert all(c.isprintable() or c == "\n" for c in card)
    code = card.split("```python\n")[1].split("```")[0]

    def calls(text):
        return [ast.unparse(node.func) for node in ast.walk(ast.parse(text))
                if isinstance(node, ast.Call)]  # fmt: skip

    assert calls(code) == calls(expected.split("```python\n")[1].split("```")[0])
