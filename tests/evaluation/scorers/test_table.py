"""One interface for scorers, and the table: its names, plug-ins, and what is refused."""

import dataclasses
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlcm_jax.evaluation.scorers import base, table
from tlcm_jax.evaluation.scorers.base import Measure, Scorer


@dataclasses.dataclass(frozen=True, eq=False)
class Red(Scorer):
    """How red an image is, for the length of its text: by `how`, from the mean of red."""

    path: str = ""
    how: object = None
    differentiable: bool = True

    name = "red"
    threshold = 7.0

    @property
    def params(self):
        return {"factor": np.float32(3.0)}

    def texts(self, prompts):
        return {"length": np.array([len(prompt) for prompt in prompts], np.float32)}

    def score(self, params, images, texts):
        red = jnp.mean(images[..., 0], axis=(1, 2))
        return params["factor"] * (self.how or (lambda x: x))(red) * texts["length"]


PROMPTS = ["a cat", "a dog", "an icon", "red", "a sun"]


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)


@pytest.fixture
def plugin(monkeypatch):
    """Puts a loader where the name `some.plugin` finds it."""

    def put(**contents):
        module = types.ModuleType("some.plugin")
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, "some", types.ModuleType("some"))
        monkeypatch.setitem(sys.modules, "some.plugin", module)

    return put


def test_a_score_of_single_images_is_all_a_scorer_needs(images):
    scorer = Red()
    assert scorer.measures == (Measure(key="red", title="red score"),)
    scorer.check(PROMPTS, {})
    values = scorer.values(images, PROMPTS, {})
    by_hand = 3 * images[..., 0].mean((1, 2)) / 255 * [len(prompt) for prompt in PROMPTS]
    assert set(values) == {"red"}
    np.testing.assert_allclose(values["red"], by_hand, rtol=1e-5)
    assert scorer.summarise(values) == {"red": pytest.approx(by_hand.mean(), rel=1e-5)}
    assert scorer.real_data_score("heldout", 5) == {}
    for size in (2, 5, 7):
        np.testing.assert_allclose(
            base.image_scores(scorer, images, PROMPTS, size), by_hand, rtol=1e-5
        )


def test_a_scorer_is_compiled_once(images):
    traced = []

    def counting(x):
        traced.append(x.shape)
        return x

    scorer = Red(how=counting)
    for _ in range(3):
        scorer.values(images, PROMPTS, {})
    assert len(traced) == 1


def test_a_name_is_one_line_of_the_table_or_a_module(monkeypatch, plugin):
    monkeypatch.setattr(table, "SCORERS", {"red": Red})
    plugin(load=Red)
    assert table.load_scorer("red", "here").path == "here"
    loaded = table.load_scorers(["red=here=there", "some.plugin"])
    assert [scorer.path for scorer in loaded] == ["here=there", ""]
    assert table.load_scorers([]) == ()


def test_unknown_names_are_refused_with_the_known_ones(monkeypatch, plugin):
    loads = []
    monkeypatch.setattr(table, "SCORERS", {"red": loads.append})
    plugin(load=Red)
    for names, message in (
        (["red", "clip"], "unknown scorer 'clip'; known: red, or a module with `load.path.`"),
        (["red", "no.such"], "scorer 'no.such': No module named 'no'; known: red"),
        (["red", "os.path"], "scorer 'os.path': that module has no `load`"),
        (["some.plugin", "some.plugin=x"], "some.plugin, some.plugin: name each once"),
    ):
        with pytest.raises(ValueError, match=message):
            table.load_scorers(names)
    assert not loads  # nothing is read before all the names are known


def test_a_scorer_that_cannot_be_followed_is_refused(plugin):
    def outside(x):
        shape = jax.ShapeDtypeStruct(x.shape, jnp.float32)
        return jax.pure_callback(lambda x: np.zeros(x.shape, np.float32), shape, x)

    for options, message in (
        (dict(how=jnp.round), "says it is differentiable, and its gradient in the image is 0"),
        (dict(how=outside), "scorer 'some.plugin' cannot be differentiated"),
        (dict(differentiable=False), "has no gradient in the images, so preference cannot"),
    ):
        plugin(load=lambda path, options=options: Red(path, **options))
        with pytest.raises(ValueError, match=message):
            table.load_scorer("some.plugin", differentiable=True)
        assert table.load_scorer("some.plugin")  # it can be told
    plugin(load=Red)
    assert table.load_scorer("some.plugin", differentiable=True).threshold == 7.0


def test_a_plugin_may_be_a_plain_function(plugin):
    plugin(load=lambda path: lambda images, prompts: images[..., 0].mean(axis=(1, 2)))
    scorer = table.load_scorer("some.plugin")
    images = np.zeros((2, 4, 4, 3), np.uint8)
    images[1, ..., 0] = 9
    values = scorer.values(images, ["a", "b"], {})
    np.testing.assert_array_equal(values["plugin"], [0, 9])
    assert scorer.summarise(values) == {"plugin": 4.5}
    assert [measure.key for measure in scorer.measures] == ["plugin"]
    with pytest.raises(ValueError, match="has no gradient in the images"):
        table.load_scorer("some.plugin", differentiable=True)
    plugin(load=lambda path: 3)
    with pytest.raises(ValueError, match="its `load\\(path\\)` returns int: return a Scorer, or a"):
        table.load_scorer("some.plugin")


def test_what_scores_whole_sets_has_no_score_of_one():
    class Spread(Scorer):
        name = "spread"

    with pytest.raises(NotImplementedError, match="'spread' scores whole sets"):
        Spread().score(None, None, None)
