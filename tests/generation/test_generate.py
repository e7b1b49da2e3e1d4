"""Generation: what an image depends on (prompt, seed, place) and what it does not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.tiny_pipeline import random_adapter, write_tiny_pipeline
from tlcm_jax.diffusion import sampling as sampler
from tlcm_jax.families.load import load_model
from tlcm_jax.generation import generate as module
from tlcm_jax.generation.generate import GenerationOptions, generate, generate_teacher
from tlcm_jax.models import lora
from tlcm_jax.training.mesh import make_mesh
from tlcm_jax.training.sharding import place

THREES = GenerationOptions(batch_size=3)
PROMPTS = ["a red cat", "an icon", "a cat of ice", ""]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return load_model(write_tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def adapter(pipeline):
    fresh = lora.init(pipeline.params["unet"], ("to_q", "conv1"), 2, jax.random.key(0))
    return random_adapter(fresh, np.random.default_rng(0), 0.3)


@pytest.fixture(scope="module")
def two_steps(pipeline):
    return generate(pipeline, PROMPTS, 2, seed=3)


def assert_same(first, second):
    """Equal up to rounding: sums are taken in another order in another batch."""
    assert first.shape == second.shape
    assert np.max(np.abs(first.astype(int) - second.astype(int))) <= 1


def noises(seed, place, count):
    """What a prompt's noise is defined to be: the first latent, then one for each step."""
    key = jax.random.fold_in(jax.random.key(seed), place)
    return [jax.random.normal(jax.random.fold_in(key, i), (1, 8, 8, 4)) for i in range(count)]


def null_of(model, null):
    return functools.partial(model.null_of, null)


def decoded(pipeline, latents):
    return np.round(255 * np.asarray(pipeline.decode(latents))).astype(np.uint8)


def test_the_student_is_the_sampler_s(pipeline):
    first, *fresh = noises(3, 1, 3)
    latents = sampler.sample(
        pipeline.denoiser(),
        pipeline.process,
        first,
        pipeline.encode(PROMPTS[1:2]),
        (999, 499, 124),
        gamma=0.3,
        noises=jnp.stack(fresh),
    )
    drawn = generate(pipeline, PROMPTS, 3, seed=3, gamma=0.3)
    assert drawn.shape == (4, 32, 32, 3) and drawn.dtype == np.uint8
    assert_same(drawn[1:2], decoded(pipeline, latents))


def test_the_teacher_is_the_sampler_s_from_the_same_noise(pipeline):
    latents = sampler.sample_teacher(
        pipeline.denoiser(),
        pipeline.process,
        noises(3, 1, 1)[0],
        pipeline.encode(PROMPTS[1:2]),
        null_of(pipeline, pipeline.null_conditioning()),
        steps=4,
        scale=3.0,
    )
    drawn = generate_teacher(pipeline, PROMPTS, 4, 3.0, seed=3)
    assert_same(drawn[1:2], decoded(pipeline, latents))


def test_an_image_depends_on_its_prompt_place_and_seed_only(pipeline, two_steps):
    assert two_steps.std() > 10
    # Two batches, of which the second has two unused places.
    assert_same(generate(pipeline, PROMPTS, 2, seed=3, options=THREES), two_steps)
    same_prompt = generate(pipeline, PROMPTS[:1] * 3, 2, seed=3, options=THREES)
    assert_same(same_prompt[:1], two_steps[:1])
    assert np.any(same_prompt[0] != same_prompt[1])
    other_seed = generate(pipeline, PROMPTS[:3], 2, seed=4, options=THREES)
    assert np.mean(other_seed != two_steps[:3]) > 0.5


def test_white_is_255_and_black_0(pipeline):
    decoder = pipeline.params["vae"]["decoder"]
    for bias, value in ((1e3, 255), (-1e3, 0)):
        bent = {**decoder["conv_out"], "bias": np.full(3, bias, np.float32)}
        vae = {**pipeline.params["vae"], "decoder": {**decoder, "conv_out": bent}}
        images = generate(pipeline.with_params(vae=vae), PROMPTS[:1], 1, seed=0)
        assert np.all(images == value)


def test_on_a_mesh_the_images_are_the_same(pipeline, two_steps):
    mesh = make_mesh({"data": 1, "fsdp": 2}, jax.devices()[:2])
    on_mesh = dataclasses.replace(pipeline, params=place(pipeline.params, mesh))
    # Three do not divide: the batch is filled up to four.
    assert_same(generate(on_mesh, PROMPTS[:3], 2, seed=3), two_steps[:3])


def test_an_adapter_is_merged_and_one_of_zeros_changes_nothing(pipeline, adapter, two_steps):
    zeros = jax.tree.map(np.zeros_like, adapter)
    np.testing.assert_array_equal(generate(pipeline, PROMPTS, 2, 3, zeros), two_steps)
    adapted = generate(pipeline, PROMPTS, 2, 3, adapter)
    assert np.mean(adapted != two_steps) > 0.5
    effective = lora.merge(pipeline.params["unet"], adapter)
    whole = dataclasses.replace(pipeline, params={**pipeline.params, "unet": effective})
    assert_same(generate(whole, PROMPTS, 2, 3), adapted)


def test_every_step_count_weights_and_seed_share_the_compiled_code(pipeline, adapter, two_steps):
    functions = module._encode, module._student_step, module._noise, module._decode
    compiled = [function._cache_size() for function in functions]
    generate(pipeline, PROMPTS, 3, 5, adapter, gamma=0.4)
    generate(load_model(pipeline.source), PROMPTS, 1, 3)
    assert [function._cache_size() for function in functions] == compiled
    generate_teacher(pipeline, PROMPTS, 2, 3.0, 3)
    compiled = module._teacher_step._cache_size()
    generate_teacher(pipeline, PROMPTS, 5, 3.0, 4)
    assert module._teacher_step._cache_size() == compiled


def test_what_is_read_and_how_large(pipeline):
    text, long = PROMPTS[0], " ".join(["red", "cat"] * 60)

    def drawn(prompt=text, **options):
        return generate(pipeline, [prompt], 1, 3, options=GenerationOptions(**options))

    plain = drawn()
    assert_same(drawn(prompts_2=[text]), plain)
    assert np.any(drawn(prompts_2=["an icon"]) != plain)
    cut = drawn(long)
    assert_same(drawn(" ".join(long.split()[:75])), cut)
    assert np.any(drawn(long, chunks=None) != cut)
    whole, tiled = drawn(resolution=48), drawn(resolution=48, tile=5)
    assert whole.shape == (1, 48, 48, 3)
    assert_same(tiled, whole)


def test_the_teacher_reads_long_prompts_beside_a_null_as_long(pipeline):
    long, options = " ".join(["red", "cat"] * 60), GenerationOptions(chunks=None, resolution=48)
    conditioning = pipeline.encode([long], 48, chunks=None)
    null = pipeline.null_conditioning(48, like=pipeline.tokenize([long], chunks=None))
    assert conditioning.prompt_embeds.shape[1] == null.prompt_embeds.shape[1] == 154
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 0), 0)
    noise = jax.random.normal(key, (1, 12, 12, 4))
    latents = sampler.sample_teacher(
        pipeline.denoiser(), pipeline.process, noise, conditioning, null_of(pipeline, null), 2, 3.0
    )
    drawn = generate_teacher(pipeline, [long], 2, 3.0, seed=3, options=options)
    assert_same(drawn, decoded(pipeline, latents))


def test_bad_requests_are_refused_before_anything_is_generated(pipeline):
    with pytest.raises(ValueError, match="steps = 9"):
        generate(pipeline, PROMPTS, 9, seed=0)
    with pytest.raises(ValueError, match="gamma = 1.5"):
        generate(pipeline, PROMPTS, 4, seed=0, gamma=1.5)
    with pytest.raises(ValueError, match="at least one prompt"):
        generate(pipeline, [], 4, seed=0)
    with pytest.raises(ValueError, match="resolution 30 must be a multiple of 4"):
        generate(pipeline, PROMPTS, 4, seed=0, options=GenerationOptions(resolution=30))
    with pytest.raises(ValueError, match="4 prompts, but 1 prompts_2"):
        generate(pipeline, PROMPTS, 4, seed=0, options=GenerationOptions(prompts_2=["an icon"]))
    with pytest.raises(ValueError, match="batch_size = 0"):
        GenerationOptions(batch_size=0)
    with pytest.raises(ValueError, match="tile = -1"):
        GenerationOptions(tile=-1)
    with pytest.raises(ValueError, match="steps = 1000"):
        generate_teacher(pipeline, PROMPTS, 1000, 8.0, seed=0)
