"""The stream of pairs: nothing lost, shuffled, the same whoever asks and from wherever on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_regression as toy

from tlcm_jax.training import mesh as meshes
from tlcm_jax.training import sharding
from tlcm_jax.training.pairs import PairSource, PairStream
from tlcm_jax.training.state import create

MADE = toy.PROMPTS * toy.PATHS


def state(seed=7, step=0, shift=0.0):
    params = jax.tree.map(lambda x: x + shift, toy.trainable())
    made = create(params, optax.sgd(1.0), jax.random.key(seed))
    return made.replace(step=jnp.asarray(step, jnp.int32))


def draw(source, steps, on=None, **changes):
    """Mini-batches `steps` of a fresh stream, on the host."""
    stream, frozen = PairStream(source, on), sharding.place(toy.frozen(), on, toy.RULES)
    here = sharding.place(state(**changes), on, toy.RULES)
    return [jax.tree.map(np.asarray, stream.next(step, here, frozen)) for step in steps]


def numbered(trainable, frozen, batch, keys):
    """Pairs that say which they are: prompt, path, and their prompt's key."""
    prompt = jnp.repeat(batch["number"], toy.PATHS)
    path = jnp.tile(jnp.arange(toy.PATHS), len(batch["number"]))
    return {
        "prompt": prompt,
        "path": path,
        "key": jnp.repeat(jax.random.key_data(keys), toy.PATHS, axis=0),
        "same": 10 * prompt + path,
    }


def numbered_source(prompts=toy.PROMPTS, on=None, **changes):
    def batches(r):
        return meshes.shard_batch(on, {"number": r * prompts + np.arange(prompts)})

    options = dict(sample=numbered, batches=batches, prompts=prompts)
    return toy.source(**(options | changes))


def joined(batches, name):
    return np.concatenate([batch[name] for batch in batches])


def test_no_pair_is_lost_and_a_pair_s_leaves_stay_together():
    batches = draw(numbered_source(), range(4))
    assert all(len(batch["prompt"]) == toy.BATCH for batch in batches)
    for r in range(2):
        refill = batches[2 * r : 2 * r + 2]
        wanted = r * toy.PROMPTS + np.arange(toy.PROMPTS)
        expected = (10 * wanted[:, None] + np.arange(toy.PATHS)).ravel()
        np.testing.assert_array_equal(np.sort(joined(refill, "same")), expected)
    for batch in batches:
        np.testing.assert_array_equal(batch["same"], 10 * batch["prompt"] + batch["path"])


def test_pairs_of_one_path_are_apart_and_every_refill_has_its_own_order():
    batches = draw(numbered_source(), range(4))
    unshuffled = np.repeat(np.arange(toy.PROMPTS), toy.PATHS)
    orders = [joined(batches[2 * r : 2 * r + 2], "same") % 160 for r in range(2)]
    assert np.mean(joined(batches[:2], "prompt") == unshuffled) < 0.3
    assert len(set(batches[0]["prompt"])) > toy.PROMPTS // 2
    assert np.mean(orders[0] == orders[1]) < 0.2


def test_every_epoch_sees_every_pair_once_in_an_order_of_its_own():
    source = numbered_source(epochs=3)
    assert source.steps_per_refill == 6
    batches = draw(source, range(6))
    epochs = [joined(batches[i : i + 2], "same") for i in (0, 2, 4)]
    for other in epochs[1:]:
        np.testing.assert_array_equal(np.sort(other), np.sort(epochs[0]))
        assert np.mean(other == epochs[0]) < 0.2


def test_a_prompt_s_key_is_that_of_its_place_however_the_prompts_are_cut():
    whole = draw(numbered_source(batch_size=16), range(8))
    cut = draw(numbered_source(prompts=4, batch_size=16), range(8))

    def keys(batches):
        return {
            (int(p), int(q)): tuple(key)
            for batch in batches
            for p, q, key in zip(batch["prompt"], batch["path"], batch["key"], strict=True)
        }

    assert keys(whole) == keys(cut) and len(keys(cut)) == 2 * MADE
    assert len(set(keys(whole).values())) == 2 * toy.PROMPTS


def test_a_refill_is_a_function_of_key_and_number():
    source = toy.source()
    whole = draw(source, range(4))
    toy.assert_close(draw(source, [3])[0], whole[3])  # another stream, begun in the middle
    # The number counts the step asked for; neither the state's step nor its weights matter.
    toy.assert_close(draw(source, [3], step=9, shift=1.0)[0], whole[3])
    for other in (draw(source, [3], seed=8)[0], whole[2], whole[1]):
        assert np.mean(other["x"] == whole[3]["x"]) < 0.01


def test_every_mesh_draws_the_same_pairs_and_spreads_them():
    expected = draw(toy.source(), range(3))
    on = meshes.make_mesh({"data": 2, "fsdp": 4})
    stream = PairStream(toy.source(on), on)
    frozen = sharding.place(toy.frozen(), on, toy.RULES)
    here = sharding.place(state(), on, toy.RULES)
    for step in range(3):
        found = stream.next(step, here, frozen)
        toy.assert_close(found, expected[step], 1e-5)
        for leaf in jax.tree.leaves(found):
            assert leaf.sharding.is_equivalent_to(meshes.batch_sharding(on), leaf.ndim)


def test_pairs_of_the_student_are_drawn_with_its_weights_at_the_refill_alone():
    source = toy.source(sample=toy.sample_by_student, uses_student=True)
    stream = PairStream(source)
    first = stream.next(0, state(), toy.frozen())
    moved = state(step=1, shift=1.0)
    second = jax.tree.map(np.asarray, stream.next(1, moved, toy.frozen()))
    toy.assert_close(first, draw(source, [0])[0])
    toy.assert_close(second, draw(source, range(2))[1])  # as if nothing had moved
    third = jax.tree.map(np.asarray, stream.next(2, moved, toy.frozen()))
    toy.assert_close(third, draw(source, [2], shift=1.0)[0])
    assert np.mean(third["y"] == draw(source, [2])[0]["y"]) < 0.01


def test_a_run_can_be_taken_up_anywhere_unless_pairs_depend_on_the_student():
    free, bound = PairStream(toy.source()), PairStream(toy.source(uses_student=True))
    assert [free.resumable(step) for step in range(5)] == [True] * 5
    assert [bound.resumable(step) for step in range(5)] == [True, False, True, False, True]
    with pytest.raises(ValueError, match="step 3 lies inside a refill of 2 steps .* its start"):
        bound.next(3, state(), toy.frozen())


def test_a_refill_is_drawn_once_and_its_prompts_asked_for_once():
    asked = []

    def batches(r):
        asked.append(r)
        return toy.host_batch(r)

    draw(toy.source(batches=batches, epochs=2), range(9))
    assert asked == [0, 1, 2]


def test_what_the_host_adds_is_added_once_a_refill_before_it_is_shuffled():
    asked = []

    def annotate(frozen, pairs):
        asked.append(np.asarray(pairs["same"]))
        return {**pairs, "rank": jnp.arange(MADE)}

    plain = draw(numbered_source(), range(4))
    found = draw(numbered_source(annotate=annotate), range(4))
    assert len(asked) == 2
    for r in range(2):
        wanted = r * toy.PROMPTS + np.arange(toy.PROMPTS)
        expected = (10 * wanted[:, None] + np.arange(toy.PATHS)).ravel()
        np.testing.assert_array_equal(asked[r], expected)
        for batch in found[2 * r : 2 * r + 2]:
            np.testing.assert_array_equal(asked[r][batch["rank"]], batch["same"])
    for with_rank, without in zip(found, plain, strict=True):
        np.testing.assert_array_equal(with_rank["same"], without["same"])


def test_pairs_pass_no_gradient():
    source = toy.source(sample=toy.sample_by_student, uses_student=True)
    refill = PairStream(source).refill

    def total(params):
        made = refill(params, toy.frozen(), toy.host_batch(0), jax.random.key(0), jnp.uint32(0))
        return jnp.sum(made["y"])

    for leaf in jax.tree.leaves(jax.grad(total)(toy.trainable())):
        np.testing.assert_array_equal(leaf, 0)


def test_sizes_that_do_not_fit_are_refused_with_the_nearest_that_do():
    with pytest.raises(ValueError, match="16 prompts make 64 pairs, which batch_size = 24 does "
                       "not divide; the nearest that does is 16"):  # fmt: skip
        toy.source(batch_size=24)
    with pytest.raises(ValueError, match="the nearest that does is 64"):
        toy.source(batch_size=128)
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        toy.source(epochs=0)
    one = PairSource(sample=toy.sample, batches=toy.host_batch, prompts=2, pairs_per_prompt=1,
                     batch_size=1)  # fmt: skip
    assert one.steps_per_refill == 2 and not one.uses_student
