"""Terms beside a consistency loss: where they meet, where gradients stop, what they cost."""

import dataclasses
from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.support import roles
from tests.support.gaussian_world import keys, world_of
from tests.support.roles import ADVERSE, MATCHING, every_term, frozen_of, networks_of
from tlcm_jax.config import schema
from tlcm_jax.diffusion.process import bcast_right
from tlcm_jax.distillation import registry
from tlcm_jax.distillation.lcd import LCDSettings
from tlcm_jax.distillation.mlcd import MLCDSettings
from tlcm_jax.distillation.objective import repeat, split
from tlcm_jax.distillation.terms.adversarial import AdversarialSettings
from tlcm_jax.distillation.terms.base import Context, StudentOutputs, Term
from tlcm_jax.distillation.terms.compose import StageLoss
from tlcm_jax.distillation.terms.distribution_matching import DistributionMatchingSettings
from tlcm_jax.distillation.terms.preference import LikedSettings, PreferenceSettings
from tlcm_jax.evaluation.scorers.table import load_scorer
from tlcm_jax.models.lora import LoRAConfig
from tlcm_jax.training.pairs import PairSource
from tlcm_jax.training.stage import AuxTraining, Stage, StageSpec

ENDPOINTS = LCDSettings(guidance_scale=2.0, states_per_rollout=2)
SEGMENTS = MLCDSettings(guidance_scale=2.0, points_per_segment=1)


def build(world, terms, settings=ENDPOINTS, count=roles.uncounted):
    return StageLoss(settings.build(networks_of(world, count)), terms)


def prompts_of(size):
    return [str(i + 1) for i in range(size)]


def pairs_of(world, loss, size, theta=None, frozen=None):
    """As the engine has them: what terms read of the prompts lies beside them."""
    objective = loss.objective
    pairs = jax.jit(objective.sample_pairs)(
        theta or world.trainable(), frozen or world.frozen, world.batch(size), keys(0, size)
    )
    return with_inputs(loss, pairs, size)


def with_inputs(loss, pairs, size):
    inputs = jax.tree.map(jnp.asarray, loss.prompt_inputs(prompts_of(size)))
    return pairs._replace(inputs=repeat(inputs, loss.objective.pairs_per_prompt))


def initial(loss):
    return {name: network.init(jax.random.key(3)) for name, network in loss.aux.items()}


def disturbed(tree):
    return jax.tree.map(lambda x: x + 0.1, tree)


# Where terms meet.


@pytest.fixture(scope="module", params=[("eps", 3), ("flow", 1)], ids=["vp", "flow"])
def endpoint(request):
    """Stage 2 with every term, its pairs and its parameters."""
    world = world_of(*request.param)
    loss = build(world, every_term(world))
    theta, frozen = disturbed(world.trainable()), frozen_of(world, loss.terms)
    return SimpleNamespace(
        world=world,
        loss=loss,
        theta=theta,
        frozen=frozen,
        pairs=pairs_of(world, loss, 4, theta),
        aux=disturbed(initial(loss)),
    )


def test_the_student_s_gradient_is_that_of_the_weighted_sum(endpoint):
    """Against plain differentiation of the sum, through the student and each term at once."""
    terms = {
        name: dataclasses.replace(term, max_grad_ratio=None, weight=0.3 + 0.2 * i)
        for i, (name, term) in enumerate(endpoint.loss.terms.items())
    }
    objective, pairs, frozen = endpoint.loss.objective, endpoint.pairs, endpoint.frozen
    networks, loss, own = objective.networks, StageLoss(objective, terms), keys(5, 8)

    def plain(theta):
        target = objective.target(networks.target(endpoint.theta, frozen), pairs)
        x0 = objective.predict(networks.student(theta, frozen), pairs)
        outputs = StudentOutputs(
            x0, x0, target, pairs.sample, pairs.target_time, pairs.conditioning
        )
        total = objective.loss(x0, target, pairs)[0]
        for name, term_keys in zip(sorted(terms), split(own, len(terms)), strict=True):
            term = terms[name]
            inputs = pairs.inputs.get(name, {})
            context = Context(frozen, term.params, inputs, endpoint.aux, term_keys)
            total = total + term.weight * term.loss(outputs, context)[0]
        return jnp.mean(total)

    def ours(theta):
        return jnp.mean(loss(theta, frozen, pairs, own, endpoint.aux)[0])

    (expected, wanted), (value, found) = (
        jax.jit(jax.value_and_grad(f))(endpoint.theta) for f in (plain, ours)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-7), found, wanted)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(found))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steep(Term):
    """Its gradient in x0 is 1 everywhere."""

    def loss(self, outputs, context):
        return jnp.sum(outputs.x0.reshape(len(outputs.x0), -1), axis=1), {}


@pytest.mark.parametrize("weight", [5.0, 1e-3])
def test_a_ratio_holds_a_term_s_gradient_below_the_consistency_loss_s(endpoint, weight):
    """Sample by sample, where it binds; and leaves alone what lies below."""
    objective, found = endpoint.loss.objective, {}
    for ratio in (None, 0.3):
        loss = StageLoss(objective, {"steep": Steep(weight=weight, max_grad_ratio=ratio)})

        def total(theta, loss=loss):
            value, metrics = loss(theta, endpoint.frozen, endpoint.pairs, keys(0, 8), {})
            return jnp.sum(value), metrics

        (_, metrics), slope = jax.jit(jax.value_and_grad(total, has_aux=True))(endpoint.theta)
        found[ratio] = metrics, slope
    free, held = found[None][0]["steep/grad_norm"], found[0.3][0]["steep/grad_norm"]
    np.testing.assert_allclose(free, weight * 2.0, rtol=1e-6)  # 4 elements
    limit = 0.3 * found[0.3][0]["consistency/grad_norm"]
    np.testing.assert_allclose(held, np.minimum(limit, free), rtol=1e-5)
    assert np.all(held < free) if weight == 5.0 else np.any(held == free)
    if weight == 5.0:  # what moves the student is held as well, not the metric alone
        by_ratio, by_all = (
            optax.tree.norm(jax.tree.map(jnp.subtract, found[r][1], slope_of(endpoint)))
            for r in (0.3, None)
        )
        assert 0 < by_ratio < 0.5 * by_all


def slope_of(endpoint):
    """The gradient of the consistency loss alone."""
    loss = StageLoss(endpoint.loss.objective)

    def total(theta):
        return jnp.sum(loss(theta, endpoint.frozen, endpoint.pairs, keys(0, 8), {})[0])

    return jax.jit(jax.grad(total))(endpoint.theta)


def test_gradients_reach_the_student_alone(world):
    """Frozen networks, scorers, decoder, auxiliary networks and pairs stay as they are."""
    loss = build(world, every_term(world))
    theta, batch = disturbed(world.trainable()), world.batch(2)
    frozen, aux = frozen_of(world, loss.terms), disturbed(initial(loss))

    def total(theta, frozen, aux, batch):
        pairs = loss.objective.sample_pairs(theta, frozen, batch, keys(0, 2))
        pairs = jax.lax.stop_gradient(with_inputs(loss, pairs, 2))  # as the engine has it
        return jnp.sum(loss(theta, frozen, pairs, keys(1, 4), aux)[0])

    slopes = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))(theta, frozen, aux, batch)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(slopes[0]))
    assert len(jax.tree.leaves(slopes[1])) == 3 + 1 + 2  # null, scale; LPIPS; two scorers
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(slopes[1:]))


def test_an_auxiliary_network_s_gradient_stays_with_it(endpoint):
    world, loss = endpoint.world, endpoint.loss

    @jax.jit
    def shown(theta, frozen, seed):
        own = jax.random.split(jax.random.key(seed), 8)
        return loss.aux_batch(theta, frozen, endpoint.pairs, own)

    def total(theta, frozen):
        outputs = shown(theta, frozen, 9)
        return jnp.sum(outputs.x0) + jnp.sum(outputs.jump) + jnp.sum(outputs.sample)

    slopes = jax.jit(jax.grad(total, argnums=(0, 1)))(endpoint.theta, endpoint.frozen)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(slopes))
    # Each turn shows new states of the same samples.
    first, second = (shown(endpoint.theta, endpoint.frozen, seed) for seed in (9, 10))
    for name, network in loss.aux.items():

        def aux_loss(params, frozen, network=network):
            return jnp.sum(network.loss(params, frozen, first, keys(2, 8))[0])

        slope = jax.jit(jax.grad(aux_loss))(endpoint.aux[name], endpoint.frozen)
        assert all(jnp.any(g != 0) for g in jax.tree.leaves(slope))
    np.testing.assert_array_equal(first.sample, second.sample)
    assert first.x0.shape == (8, *world.shape)
    assert not np.any(np.asarray(first.x0) == np.asarray(second.x0))


# What it costs.


def counting(forwards):
    """Networks that count their calls where they run, by role and samples."""

    def count(role, network):
        def counted(z, t, conditioning):
            jax.debug.callback(lambda: forwards.update({role: z.shape[0]}))
            return network(z, t, conditioning)

        return counted

    return count


def test_network_forwards_are_those_stated(world):
    """Counted where the engine runs them: one step, every network's every call."""
    forwards = Counter()
    count = counting(forwards)
    loss = build(world, every_term(world, count), count=count)
    frozen = frozen_of(world, loss.terms)

    def sample(trainable, frozen, batch, keys):
        pairs = loss.objective.sample_pairs(trainable, frozen, batch, keys)
        return with_inputs(loss, pairs, 2)

    source = PairSource(
        sample=sample,
        batches=lambda number: world.batch(2),
        prompts=2,
        pairs_per_prompt=2,
        batch_size=4,
        uses_student=True,
    )
    aux = {
        name: AuxTraining(
            init=network.init, optimizer=optax.sgd(1e-3), loss=network.loss, updates=network.updates
        )
        for name, network in loss.aux.items()
    }
    spec = StageSpec(
        name="one",
        steps=1,
        pairs=source,
        loss=loss,
        optimizer=optax.sgd(1e-3),
        frozen=frozen,
        nfe_per_pair=loss.nfe_per_pair.total,
        aux=aux,
        aux_batch=loss.aux_batch,
    )
    stage, state = Stage(spec), spec.create_state(world.trainable(), jax.random.key(0))
    pairs = stage.stream.next(0, state, frozen)
    _, metrics = stage.step(state, frozen, pairs)
    jax.effects_barrier()
    assert bool(metrics["finite"])
    stated = loss.nfe_per_pair
    assert forwards["teacher"] == stated.teacher * 4
    assert forwards["student"] == (stated.rollout + stated.target + stated.student) * 4
    assert forwards["fake_score"] + forwards["discriminator"] == stated.aux * 4


def test_a_target_that_auxiliary_networks_see_costs_one_more(world):
    """PCM's discriminator: the student's jump and its target, in each turn."""
    forwards = Counter()
    count = counting(forwards)
    chosen = AdversarialSettings(real="target", times=(125,), aux_updates=3)
    loss = build(world, {"adversarial": roles.adversarial(world, chosen, count)}, SEGMENTS, count)
    pairs = pairs_of(world, build(world, {}, SEGMENTS), 2)
    count_of = len(pairs.z_m)
    shown = jax.jit(loss.aux_batch)(world.trainable(), world.frozen, pairs, keys(0, count_of))
    jax.effects_barrier()
    assert shown.target.shape == shown.jump.shape and shown.sample is None
    np.testing.assert_array_equal(shown.target_time, pairs.target_time)
    assert 3 * forwards["student"] == loss.nfe_per_pair.rollout * count_of


def test_without_a_consistency_loss_no_teacher_walks(world):
    """DMD2: what terms ask is all that is asked, and nothing is computed for the rest."""
    forwards = Counter()
    count = counting(forwards)
    settings = dataclasses.replace(ENDPOINTS, weight=0.0)
    chosen = DistributionMatchingSettings()
    terms = {"distribution_matching": roles.matching(world, chosen, count)}
    loss = build(world, terms, settings, count)
    theta = disturbed(world.trainable())
    pairs = pairs_of(world, loss, 2, theta)
    jax.effects_barrier()
    assert forwards == {"student": 4 * 2}
    _, metrics = jax.jit(loss.__call__)(theta, world.frozen, pairs, keys(0, 4), initial(loss))
    jax.effects_barrier()
    assert forwards == {"student": 4 * 2 + 4, "teacher": 2 * 4, "fake_score": 4}
    np.testing.assert_array_equal(metrics["consistency/grad_norm"], 0)
    assert np.all(metrics["distribution_matching/grad_norm"] > 0)
    with pytest.raises(ValueError, match="asks nothing of the student"):
        build(world, {}, settings)


def test_the_stated_costs(world):
    """Beside stage 2's own 4 + 6 + 2: what 5 updates to 1 come to."""

    def cost(**terms):
        return build(world, terms, LCDSettings()).nfe_per_pair.total

    matching = roles.matching(world, DistributionMatchingSettings())
    adverse = roles.adversarial(world, AdversarialSettings())
    assert cost() == cost(preference=roles.preference(world)) == 12
    assert cost(distribution_matching=matching) == 12 + 2 + 1 + 5 * 2
    assert cost(adversarial=adverse) == 12 + 1 + 5 * 3
    # What the student makes is made once for both.
    assert cost(distribution_matching=matching, adversarial=adverse) == 12 + 2 + 1 + 1 + 5 * 4


# What ends a stage, and what is refused.


def test_the_first_term_with_a_reason_ends_the_stage(world):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Impatient(Steep):
        after: int

        def should_stop(self, rows, prefix):
            return f"{prefix} has seen enough" if len(rows) >= self.after else ""

    terms = {"one": Impatient(weight=1.0, after=3), "two": Impatient(weight=1.0, after=2)}
    loss = build(world, terms)
    assert [loss.should_stop([{}] * n) for n in range(4)] == [
        "", "", "two has seen enough", "one has seen enough",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("preference", roles.preference),  # a share of no gradient is none
        ("latent_lpips", lambda world: roles.latent_lpips()),
        ("adversarial", lambda w: roles.adversarial(w, AdversarialSettings(real="target"))),
    ],
)
def test_a_term_held_against_the_target_needs_one(world, name, make):
    settings = dataclasses.replace(ENDPOINTS, weight=0.0)
    with pytest.raises(ValueError, match=f"no target and no gradient of its own, which {name} is"):
        build(world, {name: make(world)}, settings)


ONE = {"a": LikedSettings(weights="b")}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (DistributionMatchingSettings, {"weight": -1.0}, "weight = -1.0: must be at least 0"),
        (DistributionMatchingSettings, {"low": 500, "high": 20}, "high = 20: must be at least 500"),
        (DistributionMatchingSettings, {"aux_updates": 0}, "aux_updates = 0"),
        (DistributionMatchingSettings, {"aux_learning_rate": 0.0}, "greater than 0"),
        (AdversarialSettings, {"loss": "lsgan"}, "loss = 'lsgan': must be one of hinge, softplus"),
        (AdversarialSettings, {"times": ()}, "number of times = 0"),
        (AdversarialSettings, {"times": (-1,)}, "the smallest of times = -1"),
        (AdversarialSettings, {"real": "data"}, "must be one of sample, target"),
        (PreferenceSettings, {"scorers": ONE, "max_grad_ratio": 2.0}, "max_grad_ratio = 2.0"),
        (
            PreferenceSettings,
            {"scorers": ONE, "held_out": "a", "held_out_weights": "b"},
            "held_out: scorer 'a' cannot be its own check",
        ),
        (
            PreferenceSettings,
            {"scorers": ONE, "stop_on_reward_hacking": True},
            "needs a held_out scorer",
        ),
        (PreferenceSettings, {"scorers": {}}, "scorers: none has a weight above 0"),
        (
            PreferenceSettings,
            {"scorers": {**ONE, "c": LikedSettings(scorer="a", weights="b", weight=2.0)}},
            "scorers: 'c' is 'a' again; name each once",
        ),
        (LikedSettings, {"weight": -1.0}, "weight = -1.0: must be at least 0"),
    ],
)
def test_bad_settings_are_refused(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        kind(**changes)


def test_terms_that_do_not_fit_are_refused_before_a_step(world):
    adverse = {"adversarial": roles.adversarial(world, ADVERSE)}
    with pytest.raises(ValueError, match="'adversarial' compares with the student's own sample"):
        build(world, adverse, SEGMENTS)
    # Noised data have a sample, and so do phases with a target.
    build(world, adverse, dataclasses.replace(SEGMENTS, mode="data"))
    with_target = {"adversarial": roles.adversarial(world, AdversarialSettings(real="target"))}
    build(world, with_target, SEGMENTS)
    with pytest.raises(ValueError, match="shown the student's own target, not its EMA's"):
        build(world, with_target, dataclasses.replace(SEGMENTS, target="ema"))
    term = roles.matching(world, MATCHING)
    with pytest.raises(ValueError, match="two terms train a network called 'fake_score'"):
        build(world, {"one": term, "two": term})


def test_a_term_of_weight_zero_is_no_term():
    assert read("lcd", {"adversarial": {"weight": 0.0}}).terms == {}
    assert list(read("lcd", {"adversarial": {"weight": 1.0}}).terms) == ["adversarial"]


def read(objective, terms):
    """A stage of a least recipe."""
    stage = {"objective": objective, "steps": 1, "batch_size": 1, "learning_rate": 1e-4}
    stage["terms"] = terms
    recipe = {"name": "x", "model": {"path": "x"}, "prompts": ("x",), "stages": {"one": stage}}
    return schema.read(recipe).stages["one"]


# A new term with a scorer: its settings and the term itself; and one line in the table.


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardSettings:
    weight: float = 1.0
    scorer: str = roles.SCORER

    def load(self, model, networks, adapter):
        scorer = load_scorer(self.scorer, "1", differentiable=True)
        return Reward(weight=self.weight, params=scorer.params, scorer=scorer, networks=networks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward(Term):
    scorer: object
    networks: object

    def prompt_inputs(self, prompts):
        return {"texts": self.scorer.texts(prompts)}

    def loss(self, outputs, context):
        images = self.networks.decode(context.frozen)(outputs.x0)
        score = self.scorer.score(context.params, images, context.inputs["texts"])
        return -score, {"score": score}


def test_a_new_term_with_a_scorer_is_a_class_and_a_line(any_world, monkeypatch):
    world = any_world
    monkeypatch.setitem(registry.TERMS, "reward", RewardSettings)
    stage = read("mlcd", {"reward": {"weight": 0.5}})
    networks = networks_of(world)
    term = stage.terms["reward"].load(roles.model_of(world), networks, LoRAConfig())
    loss = StageLoss(stage.settings.build(networks), {"reward": term})
    pairs, frozen = pairs_of(world, loss, 2), frozen_of(world, loss.terms)
    count = len(pairs.z_m)
    texts = np.repeat([1.0, 2.0], count // 2)
    np.testing.assert_array_equal(pairs.inputs["reward"]["texts"], texts)
    theta = world.trainable()
    value, metrics = jax.jit(loss.__call__)(theta, frozen, pairs, keys(0, count), {})
    x0 = loss.objective.predict(world.student(theta, frozen), pairs)
    error = jnp.tanh(x0) - bcast_right(jnp.asarray(texts), x0)
    score = 10 - np.mean(np.square(error).reshape(count, -1), axis=1)
    np.testing.assert_allclose(metrics["reward/score"], score, rtol=1e-5)
    np.testing.assert_allclose(metrics["reward/loss"], -score, rtol=1e-5)
    alone, _ = world.loss(StageLoss(loss.objective).objective, pairs, theta)
    np.testing.assert_allclose(value, alone - 0.5 * score, rtol=1e-5)
