"""From a recipe with SDXL's values to stages: what each setting comes to, by shapes and in use."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.support.tiny_pipeline import random_adapter
from tests.support.tiny_world import all_terms, tiny_recipe, write_tiny_world
from tlcm_jax.config.build import initial_trainable, load_losses, nfe_per_pair, stage_spec
from tlcm_jax.config.outputs import load_outputs
from tlcm_jax.config.run import PromptBatches, _place_terms, frozen_params
from tlcm_jax.config.schema import read
from tlcm_jax.distillation.networks import TERMS, model_networks
from tlcm_jax.families.load import abstract_model, load_model
from tlcm_jax.models import lora
from tlcm_jax.models.lora import LoRAConfig
from tlcm_jax.training.mesh import make_mesh
from tlcm_jax.training.stage import Stage

# The paper's, on SDXL.
RANK, ALPHA = 64, 8.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def shapes(folder):
    """The teacher's shapes: nothing is compiled."""
    return abstract_model(folder / "teacher")


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 8})


def stages(folder, **last):
    first = dict(
        objective="mlcd",
        steps=12,
        batch_size=8,
        prompts_per_refill=8,
        learning_rate=1e-3,
        warmup_steps=2,
        decay="linear",
        final_fraction=0.25,
        epochs=3,
        settings=dict(segments=4, points_per_segment=4),  # 17 pairs a prompt: 136
    )
    second = dict(
        objective="lcd",
        steps=4,
        batch_size=16,
        prompts_per_refill=8,
        accumulate=2,
        learning_rate=1e-5,
        max_grad_norm=0.5,
        ema_decay=0.9,
        settings=dict(
            segments=2, teacher_substeps=1, rollout_timesteps=[999], states_per_rollout=2
        ),
        terms=all_terms(folder),
    )
    return dict(zeroth=first, last={**second, **last})


def build(folder, shapes, mesh, raw=None, **changes):
    """Every stage of a recipe, by its name; the teacher's weights are shapes."""
    settings = read(tiny_recipe(folder, raw or stages(folder), **changes))
    losses = load_losses(settings, shapes)
    return {
        name: stage_spec(name, stage, losses[name], mesh, lambda r: None, {})
        for name, stage in settings.stages.items()
    }


@pytest.fixture(scope="module")
def built(folder, shapes, mesh):
    return build(folder, shapes, mesh, adapter=dict(rank=RANK, alpha=ALPHA))


def rates(optimizer, count, scale=1.0):
    """The rates that an Adam really takes: of a constant gradient its step is the rate itself."""
    params = {"w": jnp.zeros(())}
    state, found = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for _ in range(count):
        moved, state = update({"w": jnp.float32(scale)}, state, params)
        found.append(-float(moved["w"]))
    return found


def test_small_gradients_move_by_the_recipe_s_adam_eps(folder, shapes, mesh):
    small = stages(folder, learning_rate=1e-3, adam_eps=1e-13)
    last = build(folder, shapes, mesh, small)["last"]
    assert rates(last.optimizer, 1, 1e-9) == pytest.approx([1e-3], rel=1e-3)
    assert all(
        rates(aux.optimizer, 1, 1e-9) == pytest.approx(rates(aux.optimizer, 1), rel=1e-3)
        for aux in last.aux.values()
    )
    default = build(folder, shapes, mesh, stages(folder, learning_rate=1e-3))["last"]
    assert rates(default.optimizer, 1, 1e-9)[0] < 1e-4


def test_the_recipe_s_order_is_the_stages_order(built):
    assert list(built) == ["zeroth", "last"]


def test_sizes_and_steps_are_the_recipe_s(built):
    first, last = built.values()
    assert (first.steps, first.accumulate, first.ema_decay) == (12, 1, 0.0)
    assert (last.steps, last.accumulate, last.ema_decay) == (4, 2, 0.9)
    for spec, pairs, epochs, student in ((first, 17, 3, False), (last, 2, 1, True)):
        source = spec.pairs
        assert (source.prompts, source.pairs_per_prompt) == (8, pairs)
        assert (source.epochs, source.uses_student) == (epochs, student)
    assert first.pairs.steps_per_refill == 3 * 17 and last.pairs.steps_per_refill == 1
    assert first.name == "zeroth" and first.aux == {}
    assert last.should_stop([]) == "" and last.aux_batch is not None


def test_the_decay_ends_with_the_stage_s_steps_whatever_the_epochs(built):
    """Steps are updates: epochs are among them, and not beside them."""
    found = rates(built["zeroth"].optimizer, 13)
    ramp = [0.5e-3, 1e-3]
    line = [1e-3 * (1 - 0.75 * i / 10) for i in range(11)]
    np.testing.assert_allclose(found, ramp + line, rtol=1e-4)
    np.testing.assert_allclose(rates(built["last"].optimizer, 3), 1e-5, rtol=1e-4)


def test_each_auxiliary_network_has_its_own_rate_and_number_of_updates(built):
    aux = built["last"].aux
    assert {name: spec.updates for name, spec in aux.items()} == {
        "fake_score": 2, "discriminator": 1,
    }  # fmt: skip
    for name, rate in (("fake_score", 3e-4), ("discriminator", 7e-4)):
        np.testing.assert_allclose(rates(aux[name].optimizer, 4), rate, rtol=1e-4)
    # A discriminator's AdamW has no momentum: it forgets the last gradient at once.
    for name, b1 in (("fake_score", 0.9), ("discriminator", 0.0)):
        optimizer, params = aux[name].optimizer, {"w": jnp.zeros(())}
        _, state = optimizer.update({"w": jnp.float32(0.1)}, optimizer.init(params), params)
        np.testing.assert_allclose(optax.tree.get(state, "mu")["w"], (1 - b1) * 0.1, rtol=1e-5)


def test_the_stage_s_clip_is_everyone_s(built):
    last = built["last"]
    for optimizer, b1 in ((last.optimizer, 0.9), (last.aux["fake_score"].optimizer, 0.9)):
        params = {"w": jnp.zeros(())}
        _, state = optimizer.update({"w": jnp.float32(30.0)}, optimizer.init(params), params)
        np.testing.assert_allclose(optax.tree.get(state, "mu")["w"], (1 - b1) * 0.5, rtol=1e-5)


def test_what_a_pair_costs_counts_the_epochs(built, folder, shapes):
    losses = load_losses(read(tiny_recipe(folder, stages(folder))), shapes)
    # Made by one guided call, shared by three visits of target and student.
    assert nfe_per_pair(losses["zeroth"], 3) == pytest.approx((2 + 3 * 2) / 3)
    assert built["zeroth"].nfe_per_pair == pytest.approx(8 / 3)
    # Half a rollout step, a guided call, target, student; two batches shown to the auxiliary
    # networks; matching: a guided call, fake score, two updates; adversarial: two, then two and
    # one with its own... as the terms count them.
    terms = losses["last"].terms.values()
    expected = (0.5 + 2 + 1 + 1) + 2 + sum(term.nfe.total for term in terms)
    assert built["last"].nfe_per_pair == pytest.approx(expected)


def test_what_is_trained_is_an_adapter_or_all_of_the_teacher_s_leaves(folder, shapes):
    def theta(**changes):
        settings = read(tiny_recipe(folder, stages(folder), **changes))
        return jax.eval_shape(lambda: initial_trainable(settings, shapes, jax.random.key(0)))

    base = shapes.params["unet"]
    assert jax.tree.structure(theta(trainable="full", export=["pipeline"])) == jax.tree.structure(
        base
    )
    for leaf in jax.tree.leaves(theta(adapter=dict(rank=3))):
        assert 3 in leaf.shape


def test_every_term_fits_the_real_networks(folder, shapes, mesh):
    """A whole step of everything by its shapes: pairs, what is shown, every update."""
    settings = read(tiny_recipe(folder, stages(folder)))
    losses = load_losses(settings, shapes)
    stage, loss = settings.stages["last"], losses["last"]

    def conditioning(count):
        ids = tuple(jax.ShapeDtypeStruct((count, 77), jnp.int32) for _ in range(2))
        return jax.eval_shape(lambda p, i: shapes.encode_tokens(p, i), shapes.text_params, ids)

    frozen = frozen_params(shapes, conditioning(1))
    frozen[TERMS] = _place_terms(loss, mesh, {})
    spec = stage_spec("last", stage, loss, mesh, lambda r: None, frozen)
    prepared = Stage(spec)
    theta = jax.eval_shape(lambda: initial_trainable(settings, shapes, jax.random.key(0)))
    assert set(loss.aux) == {"fake_score", "discriminator"}
    state = jax.eval_shape(spec.create_state, theta, jax.random.key(0))
    batch = {
        "conditioning": conditioning(8),
        "inputs": jax.eval_shape(lambda: loss.prompt_inputs(["a red cat"] * 8)),
    }
    number = jnp.zeros((), jnp.uint32)
    refill = jax.eval_shape(prepared.stream.refill, theta, frozen, batch, state.key, number)
    assert refill.z_m.shape == (1, 16, 8, 8, 4)
    pairs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), refill)
    shown = jax.eval_shape(prepared._aux_batch, state, frozen, pairs, 0)
    assert shown.x0.shape == shown.sample.shape == (16, 8, 8, 4)
    for name, update in prepared.aux_updates.items():
        moved, metrics = jax.eval_shape(update, state, frozen, shown)
        assert jax.tree.structure(moved) == jax.tree.structure(state), name
        assert metrics["loss"].shape == ()
    moved, metrics = jax.eval_shape(prepared.update, state, frozen, pairs)
    assert jax.tree.map(lambda x: x.shape, moved) == jax.tree.map(lambda x: x.shape, state)
    named = {f"{term}/{what}" for term in stage.terms for what in ("loss", "grad_norm")}
    assert named | {"preference/liked/score", "preference/held_out", "mse_x0"} <= set(metrics)


def test_alpha_over_rank_scales_the_adapter_once_beside_and_merged(folder):
    """Theta as W + (alpha / rank) B A by hand, in every place that an adapter is applied."""
    model = load_model(folder / "teacher")
    base = model.params["unet"]
    factors = random_adapter(lora.init(base, lora.TARGETS, 4, jax.random.key(0)),
                             np.random.default_rng(0), 0.3)  # fmt: skip
    by_hand = copy.deepcopy(jax.tree.map(np.asarray, base))

    def add(kernels, below):
        if "lora_A" in below:
            down, up = (np.asarray(below[name], np.float64) for name in ("lora_A", "lora_B"))
            update = down @ up.reshape(up.shape[-2:])
            kernels["kernel"] = (kernels["kernel"] + 0.125 * update).astype(np.float32)
            return
        for name, leaf in below.items():
            add(kernels[name], leaf)

    add(by_hand, factors)
    z = jax.random.normal(jax.random.key(1), (2, 8, 8, 4))
    t = jnp.array([999, 400])
    conditioning = model.encode(["a red cat", "a cat"])
    frozen = frozen_params(model, model.null_conditioning())

    @jax.jit
    def predict(params):
        return model.denoiser(params)(z, t, conditioning)

    expected = predict(by_hand)
    assert np.abs(expected - predict(base)).max() > 0.01
    for merged in (False, True):
        networks = model_networks(model, LoRAConfig(rank=4, alpha=0.5, merged=merged))
        student = jax.jit(lambda f, role=networks.student: role(factors, f)(z, t, conditioning))
        np.testing.assert_allclose(student(frozen), expected, rtol=1e-4, atol=2e-5)
    target = jax.jit(lambda f: networks.target(factors, f)(z, t, conditioning))
    np.testing.assert_allclose(target(frozen), expected, rtol=1e-4, atol=2e-5)


def test_stages_draw_their_prompts_in_orders_of_their_own(folder, mesh):
    """The second stage does not begin where the first began; a stage repeats itself."""
    model = load_model(folder / "teacher")
    settings = read(tiny_recipe(folder, stages(folder)))
    losses = load_losses(settings, model)
    prompts = [f"a cat {i}" for i in range(64)]
    batches = PromptBatches(model, prompts, mesh, settings)
    known = model.tokenize(prompts)[0]
    batches._encode = lambda params, ids, size: ids  # tokens say which prompt it is

    def drawn(index):
        name = list(settings.stages)[index]
        of = batches.of(name, losses[name])
        tokens = np.concatenate([np.asarray(of(r)["conditioning"][0]) for r in range(8)])
        return [int(np.flatnonzero((known == row).all(1))[0]) for row in tokens]

    first, last = drawn(0), drawn(1)
    assert sorted(first) == sorted(last) == list(range(64))  # an epoch: each prompt once
    assert first != last and np.mean(np.array(first) == last) < 0.2
    assert drawn(0) == first
    other = read(tiny_recipe(folder, stages(folder), seed=1))
    batches = PromptBatches(model, prompts, mesh, other)
    batches._encode = lambda params, ids, size: ids
    assert drawn(0) not in (first, last)


def test_stages_share_the_weights_of_a_term_that_they_share(folder, shapes):
    twice = stages(folder)
    look = dict(latent_lpips=twice["last"]["terms"]["latent_lpips"])
    twice["zeroth"]["terms"] = look
    losses = load_losses(read(tiny_recipe(folder, twice)), shapes)
    assert losses["zeroth"].terms["latent_lpips"] is losses["last"].terms["latent_lpips"]


def test_gamma_0_reaches_the_evaluation(folder):
    chosen = dict(prompts=[str(folder / "prompts.txt")], gamma=0, steps=[2])
    assert load_outputs(read(tiny_recipe(folder, stages(folder), evaluation=chosen))).gamma == 0.0


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (dict(batch_size=24, accumulate=1), "which batch_size = 24 does not divide"),
        (dict(batch_size=16, accumulate=4), "pairs of a micro-batch .* is 4, which the 8 devices"),
        (dict(prompts_per_refill=6), "stages.last.prompts_per_refill is 6, which the 8 devices"),
        (dict(learning_rate=0), "stages.last: learning_rate and max_grad_norm must be positive"),
        (dict(decay="linear", warmup_steps=4), "stages.last: a linear decay needs more updates"),
        (dict(decay="step"), "stages.last: unknown decay 'step'"),
        (dict(settings=dict(segments=3)), "stages.last: segments = 3"),
        (
            dict(terms=dict(adversarial=dict(layers=["up_blocks.0"]))),
            "stages.last: layers = .*this UNet has down_blocks.0",
        ),
        (
            dict(terms=dict(preference=dict(scorers=dict(nothing={})))),
            "unknown scorer 'nothing'; known: ",
        ),
        (
            dict(objective="mlcd", settings=dict(target="ema"), terms={}, ema_decay=0.0),
            "stages.last: target = 'ema' needs one: set ema_decay above 0",
        ),
        (
            dict(objective="mlcd", settings=dict(mode="data"), terms={}),
            "stages.last makes its states of real latents: set `latents`",
        ),
    ],
)
def test_what_does_not_fit_is_said_with_its_stage(folder, shapes, mesh, last, message):
    with pytest.raises(ValueError, match=message):
        build(folder, shapes, mesh, stages(folder, **last))


def test_weights_that_are_not_there_are_said(folder, shapes, mesh):
    liked = dict(scorer="miniature.contrastive", weights="nowhere")
    terms = dict(preference=dict(scorers=dict(liked=liked)))
    with pytest.raises(FileNotFoundError, match="nowhere holds no scorer"):
        build(folder, shapes, mesh, stages(folder, terms=terms))
