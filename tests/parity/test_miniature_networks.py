"""The embedded teachers, component by component, against diffusers and transformers (fp32)."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity with PyTorch needs torch and diffusers")
diffusers = pytest.importorskip("diffusers", reason="parity with PyTorch needs diffusers")

from tlcm_jax.data.tokens import tokenize  # noqa: E402
from tlcm_jax.families.load import load_model  # noqa: E402
from tlcm_jax.paths import MINIATURE  # noqa: E402

PROMPTS = ["a 3D render of a red apple", "", "a flat icon of a fire engine, " * 20]


@pytest.fixture(scope="module", params=["emoji-xl", "shapes-xl"])
def folder(request):
    return MINIATURE / request.param


@pytest.fixture(scope="module")
def ours(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(
        folder, torch_dtype=torch.float32, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def relative(ours, theirs):
    theirs = theirs.detach().numpy()
    return np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs)


def nchw(array):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(array), -1, 1)))


def nhwc(tensor):
    return tensor.permute(0, 2, 3, 1)


def test_conditioning(ours, theirs):
    with torch.no_grad():
        embeds, _, pooled, _ = theirs.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    conditioning = ours.encode(PROMPTS)
    assert relative(conditioning.prompt_embeds, embeds) < 1e-5
    assert relative(conditioning.pooled, pooled) < 1e-5
    side = theirs.default_sample_size * theirs.vae_scale_factor
    np.testing.assert_array_equal(conditioning.time_ids[0], [side, side, 0, 0, side, side])


def test_prompt_2(ours, theirs):
    others = ["a sunflower", "a red apple", ""]
    with torch.no_grad():
        embeds, _, pooled, _ = theirs.encode_prompt(
            PROMPTS, prompt_2=others, do_classifier_free_guidance=False
        )
    conditioning = ours.encode_tokens(ours.params, tokenize(ours.tokenizers, PROMPTS, others))
    assert relative(conditioning.prompt_embeds, embeds) < 1e-5
    assert relative(conditioning.pooled, pooled) < 1e-5
    assert relative(ours.encode(PROMPTS).pooled, pooled) > 0.1


def test_prompts_over_77_tokens(ours, theirs):
    """Each chunk of 75 tokens is encoded as a prompt; the first chunk's pooled output counts."""
    text = PROMPTS[2]
    embeds = []
    for tokenizer, tower in (
        (theirs.tokenizer, theirs.text_encoder),
        (theirs.tokenizer_2, theirs.text_encoder_2),
    ):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert 75 < len(ids) <= 225
        outputs = []
        for start in range(0, len(ids), 75):
            row = [tokenizer.bos_token_id, *ids[start : start + 75], tokenizer.eos_token_id]
            row += [tokenizer.pad_token_id] * (77 - len(row))
            with torch.no_grad():
                outputs.append(tower(torch.tensor([row]), output_hidden_states=True))
        embeds.append(torch.cat([output.hidden_states[-2] for output in outputs], dim=1))
    tokens = tokenize(ours.tokenizers, [text], chunks=None)
    conditioning = ours.encode_tokens(ours.params, tokens)
    assert relative(conditioning.prompt_embeds, torch.cat(embeds, dim=-1)) < 1e-5
    assert relative(conditioning.pooled, outputs[0].text_embeds) < 1e-5


def test_null_conditioning(ours, theirs):
    with torch.no_grad():
        _, negative, _, pooled = theirs.encode_prompt([PROMPTS[0]])
    null = ours.null_conditioning()
    assert not np.any(null.prompt_embeds) and not negative.any()
    assert not np.any(null.pooled) and not pooled.any()


def test_unet(ours, theirs):
    z = jax.random.normal(jax.random.key(0), (3, *ours.latent_shape()))
    t = np.array([999, 500, 3])
    conditioning = ours.encode(PROMPTS)
    output = jax.jit(ours.predict)(ours.params["unet"], z, t, conditioning)
    with torch.no_grad():
        expected = theirs.unet(
            nchw(z),
            torch.from_numpy(t),
            torch.from_numpy(np.array(conditioning.prompt_embeds)),
            added_cond_kwargs={
                "text_embeds": torch.from_numpy(np.array(conditioning.pooled)),
                "time_ids": torch.from_numpy(np.array(conditioning.time_ids)),
            },
        ).sample
    assert relative(output, nhwc(expected)) < 1e-5


def test_autoencoder(ours, theirs):
    images = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3))
    latents = ours.encode_images(images)
    factor = ours.vae.config.scaling_factor
    with torch.no_grad():
        expected = theirs.vae.encode(nchw(2 * images - 1)).latent_dist.mean * factor
        decoded = theirs.vae.decode(nchw(latents) / factor).sample
    assert relative(latents, nhwc(expected)) < 1e-5
    assert relative(ours.decode(latents), nhwc((decoded / 2 + 0.5).clamp(0, 1))) < 1e-5
