"""A recipe with `model.controls`: from maps beside the prompts to a student, through `train`."""

import copy
import json

import jax
import numpy as np
import pytest
from PIL import Image

from tests.support.controls import tiny_controlnet, write_control
from tests.support.tiny_pipeline import UNET, write_tiny_pipeline
from tlcm_jax.config.build import load_losses
from tlcm_jax.config.run import train
from tlcm_jax.config.schema import read
from tlcm_jax.families.load import load_model

PROMPTS = ("a red cat", "a cat icon")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_tiny_pipeline(folder / "teacher")
    write_control(folder / "canny", tiny_controlnet(UNET))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    write_maps(folder / "maps", 0)
    return folder


def write_maps(folder, seed, prompts=PROMPTS):
    folder.mkdir()
    rng, lines = np.random.default_rng(seed), []
    for i, prompt in enumerate(prompts):
        image = rng.integers(0, 256, (40, 32, 3), np.uint8)
        Image.fromarray(image).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": prompt}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


@pytest.fixture
def config(world):
    return dict(
        name="tiny",
        model=dict(
            path=str(world / "teacher"),
            controls=dict(
                edges=dict(path=str(world / "canny"), images=str(world / "maps"), scale=0.5)
            ),
        ),
        prompts=[str(world / "prompts.txt")],
        adapter=dict(rank=2, alpha=2.0, merged=True),
        stages=dict(
            only=dict(
                objective="mlcd", steps=1, batch_size=24, prompts_per_refill=8, learning_rate=1e-1,
                settings=dict(segments=2, points_per_segment=1, guidance_scale=2.0),
            ),
        ),
        checkpoint_every=1,
        export=[],
    )  # fmt: skip


def changed(config, **edges):
    config = copy.deepcopy(config)
    config["model"]["controls"]["edges"].update(edges)
    return config


@pytest.mark.slow
def test_a_run_is_steered_by_its_maps_and_remembers_them(world, config, tmp_path):
    def trained(name, recipe):
        found = train(recipe, tmp_path / name, progress=False)
        assert found.completed
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found.adapter)])

    one, again = trained("one", config), trained("again", config)
    np.testing.assert_array_equal(one, again)
    assert np.all(np.isfinite(one))
    write_maps(tmp_path / "other", 1)
    other = trained("other-run", changed(config, images=str(tmp_path / "other")))
    assert np.linalg.norm(one - other) > 1e-3 * np.linalg.norm(one)
    # The same content elsewhere would do.
    write_control(tmp_path / "canny", tiny_controlnet(UNET), seed=1)
    with pytest.raises(ValueError, match=r"belongs to a run with another config[\s\S]*controls"):
        train(changed(config, path=str(tmp_path / "canny")), tmp_path / "one", progress=False)


def test_a_prompt_without_a_map_is_named_before_anything_is_compiled(config, tmp_path):
    write_maps(tmp_path / "few", 0, PROMPTS[:1])
    with pytest.raises(ValueError, match=r"controls.edges.images = .*no map for .*'a cat icon'"):
        train(changed(config, images=str(tmp_path / "few")), tmp_path / "run", progress=False)
    with pytest.raises(FileNotFoundError, match=r"model.controls.edges.images: .*metadata.jsonl"):
        train(changed(config, images=str(tmp_path)), tmp_path / "run", progress=False)


def test_what_has_no_maps_is_refused(world, config):
    with pytest.raises(ValueError, match="model.controls.edges: scale = 3: must lie above 0, to 2"):
        read(changed(config, scale=3.0))
    with pytest.raises(ValueError, match=r"maps belong to the prompts, at one size, and latents"):
        read({**config, "latents": "latents.npz"})
    sized = {**config["model"], "buckets": {"32x32": 1.0}}
    with pytest.raises(ValueError, match=r"at one size, and model.buckets has none"):
        read({**config, "model": sized})
    with pytest.raises(ValueError, match=r"of the commands `main` alone steers by them"):
        load_losses(read(config), load_model(world / "teacher"))
