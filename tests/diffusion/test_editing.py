"""Where an edit begins and what it keeps: closed forms."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlcm_jax import paths
from tlcm_jax.diffusion import editing
from tlcm_jax.diffusion.editing import describe_edit, edit_timesteps
from tlcm_jax.diffusion.process import RectifiedFlow
from tlcm_jax.diffusion.sampling import levels


@pytest.mark.parametrize(
    ("steps", "strength", "times"),
    [
        (4, 1.0, (999, 749, 499, 124)),  # the student's own table
        (4, 0.97, (999, 749, 499, 124)),
        (2, 0.5, (499, 249)),
        (2, 0.55, (499, 249)),
        (2, 0.5625, (624, 374)),  # half-way: the stronger
        (1, 0.01, (124,)),
        (4, 0.2, (249, 124)),  # no more are left
    ],
)
def test_a_strength_is_snapped_to_a_milestone(steps, strength, times):
    assert edit_timesteps(steps, strength) == times


def test_a_student_s_own_milestones_are_taken():
    tables = {1: (999,), 2: (999, 499), 3: (999, 749, 249)}
    assert edit_timesteps(3, 0.7, tables) == (749, 249)
    assert edit_timesteps(1, 0.7, tables) == (749,)
    assert edit_timesteps(2, 1.0, tables) == (999, 499)


def test_what_was_chosen_is_said():
    said = describe_edit((499, 249), 0.45)
    assert said == "strength 0.45, snapped to the student's 0.5, is 2 steps, at 499, 249"
    assert describe_edit((124,), 0.125) == "strength 0.125 is 1 step, at 124"


@pytest.mark.parametrize("strength", [0.0, -1.0, 1.01, float("nan")])
def test_a_strength_out_of_range_is_refused(strength):
    with pytest.raises(ValueError, match="must lie above 0"):
        edit_timesteps(4, strength)
    with pytest.raises(ValueError, match="samples in 1 to 8"):
        edit_timesteps(9, 0.5)


def test_what_is_kept_lies_on_one_straight_path():
    """On a flow: the picture and its noise mixed by the level's time, whatever gamma is."""
    process, times = RectifiedFlow(), (999, 499, 249)
    picture, noise, z = jax.random.normal(jax.random.key(0), (3, 2, 4, 4, 1))
    mask = jnp.zeros((2, 4, 4, 1)).at[:, :2].set(1.0)
    start = editing.begin(process, picture, noise, jnp.float32(0.25))
    np.testing.assert_allclose(start, 0.75 * picture + 0.25 * noise, atol=1e-6)
    for gamma in (0.0, 0.3, 1.0):
        plan = levels(process, times, gamma)
        for level, sigma in zip(plan, (499 / 999, 249 / 999, 0.0), strict=True):
            kept = editing.keep(z, mask, picture, noise, jnp.asarray(level, jnp.float32))
            np.testing.assert_array_equal(kept[:, :2], z[:, :2])
            mixed = (1 - sigma) * picture + sigma * noise
            np.testing.assert_allclose(kept[:, 2:], mixed[:, 2:], atol=1e-6)


def test_the_document_s_table_is_the_rule_s():
    text = (paths.ROOT / "docs" / "applications.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (0\.\d+) \| (\d+) \| ([\d ]+) \|$", text, re.MULTILINE)
    assert len(rows) == 7
    for strength, start, times in rows:
        expected = tuple(map(int, times.split()))
        assert edit_timesteps(len(expected), float(strength)) == expected
        assert int(start) == expected[0]
