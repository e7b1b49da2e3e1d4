"""Terms beside a consistency loss: where they meet, where gradients stop, what they cost."""

import dataclasses
from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tlcm_jax.training.players import Player

from tests.support.roles import WISH, roles
from tlcm_jax.distillation import registry as stages
from tlcm_jax.distillation.lcd import EndpointConsistencySettings
from tlcm_jax.distillation.mlcd import SegmentConsistencySettings
from tlcm_jax.distillation.terms.adversarial import AdversarialSettings
from tlcm_jax.distillation.terms.compose import Made, Term, composed
from tlcm_jax.distillation.terms.distribution_matching import (
    DistributionMatchingSettings,
    distribution_matching,
)
from tlcm_jax.distillation.terms.latent_lpips import PerceptualSettings
from tlcm_jax.distillation.terms.preference import PreferenceSettings
from tlcm_jax.training import step as steps
from tlcm_jax.training.state import create

ENDPOINTS = EndpointConsistencySettings(guidance_scale=2.0, states_per_rollout=2)
SEGMENTS = SegmentConsistencySettings(guidance_scale=2.0, nodes_per_segment=1)


EVERY = {
    "latent_lpips": PerceptualSettings(weights=""),
    "preference": WISH,
    "distribution_matching": DistributionMatchingSettings(guidance_scale=2.0, critic_updates=3),
    "adversarial": AdversarialSettings(critic_updates=2),
}


def build(world, networks, settings=ENDPOINTS, terms=EVERY):
    name = next(n for n, s in stages.STAGES.items() if type(settings) is s.settings)
    made = stages.build_terms(networks, world.schedule, terms)
    return stages.build(name, networks, world.schedule, world.shape, settings, made), made


def batch_of(world, size):
    texts = jnp.arange(1.0, size + 1)
    return {
        "conditioning": world.conditioning(size),
        "reward_texts": texts,
        "judge_texts": texts,
    }


def initial(objective):
    return {name: critic.initial(jax.random.key(3)) for name, critic in objective.critics.items()}


def disturbed(tree):
    return jax.tree.map(lambda x: x + 0.1, tree)


# Where terms meet.


@pytest.fixture(scope="module")
def endpoint(world):
    """The composed objective with every term, its examples and its parameters."""
    networks = roles(world)
    objective, terms = build(world, networks)
    theta = disturbed(world.trainable())
    examples = jax.jit(objective.produce)(
        theta, world.frozen, batch_of(world, 4), jax.random.key(0)
    )
    return SimpleNamespace(
        networks=networks,
        objective=objective,
        terms=terms,
        theta=theta,
        examples=examples,
        critics=disturbed(initial(objective)),
    )


def test_the_student_s_gradient_is_that_of_the_weighted_sum(world, endpoint):
    """Against plain differentiation of the sum, through the student and each term at once."""
    terms = {
        name: dataclasses.replace(term, share=None, weight=0.3 + 0.2 * i)
        for i, (name, term) in enumerate(endpoint.terms.items())
    }
    networks = endpoint.networks
    base = stages.build("endpoint_consistency", networks, world.schedule, world.shape, ENDPOINTS)
    objective = composed(base, networks, terms)
    pairs, extras = endpoint.examples
    key = jax.random.key(5)

    def plain(theta):
        goal = base.parts.goal(networks.target(endpoint.theta, world.frozen), pairs)
        x0 = base.parts.predict(networks.student(theta, world.frozen), pairs)
        made = Made(x0, x0, goal, pairs.z0, jnp.zeros_like(pairs.t_m), pairs.conditioning)
        total = base.parts.distance(x0, goal, pairs)[0]
        for (_, term), k in zip(
            sorted(terms.items()), jax.random.split(key, len(terms)), strict=True
        ):
            value, _ = term.loss(made, extras, world.frozen, endpoint.critics, k)
            total = total + term.weight * value
        return jnp.mean(total)

    def ours(theta):
        found = objective.loss(theta, world.frozen, endpoint.examples, key, endpoint.critics)
        return jnp.mean(found[0])

    (expected, wanted), (value, found) = (
        jax.jit(jax.value_and_grad(f))(endpoint.theta) for f in (plain, ours)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-7), found, wanted)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(found))


def test_a_share_holds_a_term_s_gradient_below_the_consistency_loss_s(endpoint, world):
    steep = Term(weight=5.0, loss=lambda made, *_: (jnp.sum(made.x0, axis=(1, 2, 3)), {}))
    base = stages.build("endpoint_consistency", endpoint.networks, world.schedule, world.shape)
    found = {}
    for share in (None, 0.3):
        terms = {"steep": dataclasses.replace(steep, share=share)}
        objective = composed(base, endpoint.networks, terms)
        examples = endpoint.examples._replace(extras={})
        arguments = (endpoint.theta, world.frozen, examples, jax.random.key(0))
        found[share] = objective.loss(*arguments)[1]
    np.testing.assert_allclose(found[None]["steep/gradient"], 5 * 2.0, rtol=1e-6)  # 4 elements
    limit = 0.3 * found[0.3]["consistency/gradient"]
    assert np.all(limit < 10)
    np.testing.assert_allclose(found[0.3]["steep/gradient"], limit, rtol=1e-5)


def test_gradients_reach_the_student_alone(world):
    """In the student's loss neither frozen parameters nor critics move, nor do examples."""
    networks = roles(world, scale=True)
    frozen = {"scale": jnp.ones(()), "null": world.frozen}
    objective, _ = build(world, networks)
    theta, batch = disturbed(world.trainable()), batch_of(world, 2)
    critics = disturbed(initial(objective))

    def total(theta, frozen, critics, batch):
        examples = objective.produce(theta, frozen, batch, jax.random.key(0))
        examples = jax.tree.map(jax.lax.stop_gradient, examples)  # as the engine has it
        return jnp.sum(objective.loss(theta, frozen, examples, jax.random.key(1), critics)[0])

    by_theta, by_frozen, by_critics, by_batch = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))(
        theta, frozen, critics, batch
    )
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(by_theta))
    others = jax.tree.leaves((by_frozen, by_critics, by_batch))
    assert not any(jnp.any(leaf) for leaf in others)


def test_a_critic_s_gradient_stays_with_the_critic(world, endpoint):
    @jax.jit
    def shown(theta, key):
        return endpoint.objective.show(theta, world.frozen)(endpoint.examples, key)

    def total(theta):
        made = shown(theta, jax.random.key(9))
        return jnp.sum(made.x0) + jnp.sum(made.landing) + jnp.sum(made.sample)

    gradient = jax.jit(jax.grad(total))(endpoint.theta)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(gradient))
    # Each turn shows new states of the same samples.
    first, second = (shown(endpoint.theta, jax.random.key(i)) for i in (9, 10))
    for name, critic in endpoint.objective.critics.items():

        def loss(params, critic=critic):
            return jnp.sum(critic.loss(params, world.frozen, first, jax.random.key(2))[0])

        gradient = jax.jit(jax.grad(loss))(endpoint.critics[name])
        assert all(jnp.any(g != 0) for g in jax.tree.leaves(gradient))
    np.testing.assert_array_equal(first.sample, second.sample)
    assert not np.any(np.asarray(first.x0) == np.asarray(second.x0))


def counting(forwards):
    """Networks that count their calls where they run, by role and samples."""

    def count(role, network):
        def counted(z, t, conditioning):
            jax.debug.callback(lambda: forwards.update({role: z.shape[0]}))
            return network(z, t, conditioning)

        return counted

    return count


def test_network_evaluations_are_those_stated(world):
    """Counted where the engine runs them: one step of the game, every network's every call."""
    forwards = Counter()
    objective, made = build(world, roles(world, counting(forwards)))
    optimizer = optax.sgd(1e-3)
    players = {
        name: Player(
            initial=c.initial, loss=c.loss, optimizer=optax.sgd(c.learning_rate), updates=c.updates
        )
        for name, c in objective.critics.items()
    }
    program = steps.make_step(objective, optimizer, players=players)
    state = create(world.trainable(), optimizer, jax.random.key(0), players)
    _, metrics = program(state, world.frozen, batch_of(world, 2))
    jax.effects_barrier()
    assert bool(metrics["finite"])
    stated = stages.evaluations("endpoint_consistency", ENDPOINTS, made)
    samples = float(metrics["examples"])
    assert forwards["teacher"] == stated.teacher * samples
    assert forwards["student"] == (stated.rollout + stated.target + stated.student) * samples
    assert forwards["fake"] + forwards["discriminator"] == stated.critics * samples


def test_a_goal_that_critics_see_costs_a_target_more(world):
    """PCM's discriminator: the student's jump and its target, in each turn."""
    forwards = Counter()
    terms = {"adversarial": AdversarialSettings(real="goal", times=(125,), critic_updates=3)}
    objective, made = build(world, roles(world, counting(forwards)), SEGMENTS, terms)
    examples = jax.eval_shape(
        objective.produce, world.trainable(), world.frozen, batch_of(world, 2), jax.random.key(0)
    )
    examples = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), examples)
    shown = objective.show(world.trainable(), world.frozen)(examples, jax.random.key(0))
    jax.effects_barrier()
    assert shown.goal.shape == shown.landing.shape and shown.sample is None
    stated = stages.evaluations("segment_consistency", SEGMENTS, made)
    assert 3 * forwards["student"] == stated.rollout * len(shown.goal)


def test_without_a_consistency_loss_no_teacher_walks(world):
    """DMD2: what terms ask is all that is asked, and nothing is computed for the rest."""
    forwards = Counter()
    settings = dataclasses.replace(ENDPOINTS, weight=0.0)
    terms = {"distribution_matching": DistributionMatchingSettings()}
    networks = roles(world, counting(forwards))
    objective, _ = build(world, networks, settings, terms)
    produce, loss = jax.jit(objective.produce), jax.jit(objective.loss)
    theta, key = disturbed(world.trainable()), jax.random.key(0)
    examples = produce(theta, world.frozen, batch_of(world, 2), key)
    jax.effects_barrier()
    assert forwards == {"student": 4 * 2}
    critics = initial(objective)
    _, metrics = loss(theta, world.frozen, examples, key, critics)
    jax.effects_barrier()
    assert forwards == {"student": 4 * 2 + 4, "teacher": 2 * 4, "fake": 4}
    np.testing.assert_array_equal(metrics["consistency/gradient"], 0)
    assert np.all(metrics["distribution_matching/gradient"] > 0)
    with pytest.raises(ValueError, match="of weight 0 asks nothing"):
        build(world, networks, settings, {})


@pytest.mark.parametrize(
    "term",
    [
        ("preference", WISH),  # a share of no gradient is none
        ("latent_lpips", PerceptualSettings(weights="w")),
        ("adversarial", AdversarialSettings(real="goal")),
    ],
    ids=lambda term: term[0],
)
def test_a_term_held_against_the_goal_needs_one(world, term):
    settings = dataclasses.replace(ENDPOINTS, weight=0.0)
    with pytest.raises(ValueError, match=f"no goal and no gradient of its own, which {term[0]} is"):
        build(world, roles(world), settings, dict([term]))


def test_the_stated_costs(world):
    """Beside stage 2's own 4 + 6 + 2: what 5 updates to 1 come to."""
    networks = roles(world)

    def cost(**terms):
        settings = EndpointConsistencySettings()
        made = stages.build_terms(networks, world.schedule, terms)
        return stages.evaluations("endpoint_consistency", settings, made).total

    matching, adverse = DistributionMatchingSettings(), AdversarialSettings()
    assert cost() == cost(preference=WISH) == 12
    assert cost(distribution_matching=matching) == 12 + 2 + 1 + 5 * 2
    assert cost(adversarial=adverse) == 12 + 1 + 5 * 3
    # What the student makes is made once for both.
    assert cost(distribution_matching=matching, adversarial=adverse) == 12 + 2 + 1 + 1 + 5 * 4


# What is refused.


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (DistributionMatchingSettings, {"weight": -1.0}, "weight = -1.0: must be at least 0"),
        (DistributionMatchingSettings, {"low": 500, "high": 20}, "high = 20: must be at least 500"),
        (DistributionMatchingSettings, {"critic_updates": 0}, "critic_updates = 0"),
        (DistributionMatchingSettings, {"critic_learning_rate": 0.0}, "greater than 0"),
        (AdversarialSettings, {"loss": "lsgan"}, "loss = 'lsgan': must be one of hinge, softplus"),
        (AdversarialSettings, {"times": ()}, "number of times = 0"),
        (AdversarialSettings, {"real": "data"}, "must be one of sample, goal"),
        (PreferenceSettings, {"scorer": "a", "weights": "b", "share": 2.0}, "share = 2.0"),
        (
            PreferenceSettings,
            {"scorer": "a", "weights": "b", "judge": "a", "judge_weights": "b"},
            "cannot judge itself",
        ),
        (
            PreferenceSettings,
            {"scorer": "a", "weights": "b", "stop_when_parted": True},
            "needs a judge",
        ),
    ],
)
def test_bad_settings_are_refused(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        kind(**changes)


def test_terms_that_do_not_fit_are_refused_before_a_step(world):
    networks = roles(world)
    with pytest.raises(ValueError, match="'adversarial' compares with the student's own sample"):
        build(world, networks, SEGMENTS, {"adversarial": AdversarialSettings()})
    with pytest.raises(ValueError, match="high = 1000: must be at most 999"):
        build(
            world,
            networks,
            terms={"distribution_matching": DistributionMatchingSettings(high=1000)},
        )
    with pytest.raises(ValueError, match="preference needs a scorer, and nobody"):
        build(world, dataclasses.replace(networks, reward=None), terms={"preference": WISH})
    with pytest.raises(ValueError, match="unknown term 'gan'; known: latent_lpips, preference"):
        build(world, networks, terms={"gan": None})
    with pytest.raises(ValueError, match="two terms train a critic called"):
        term = distribution_matching(networks, world.schedule, DistributionMatchingSettings())
        base = stages.build("endpoint_consistency", networks, world.schedule, world.shape)
        composed(base, networks, {"one": term, "two": term})


def test_a_term_of_weight_zero_is_no_term(world):
    objective, made = build(
        world, roles(world), terms={"adversarial": AdversarialSettings(weight=0.0)}
    )
    assert made == {} and objective.show is None
