"""What a run goes without, and what it says of it."""

import copy

import pytest

from configs import sdxl
from tests.support import roles
from tests.support.gaussian_world import world_of
from tlcm_jax.config.optional_terms import without_missing
from tlcm_jax.config.schema import read
from tlcm_jax.io import latent_lpips_files
from tlcm_jax.models.lora import LoRAConfig


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return sdxl.get_config().to_dict()


def test_the_default_on_a_bare_disk_is_tlcm_without_what_it_cannot_read(config):
    before = copy.deepcopy(config)
    found, lines = without_missing(config)
    assert config == before
    settings = read(found)
    assert list(settings.stages) == ["segments", "endpoints", "preference", "matching"]
    assert {name: set(s.terms) for name, s in settings.stages.items()} == {
        "segments": set(), "endpoints": set(), "preference": set(),
        "matching": {"distribution_matching", "adversarial"},
    }  # fmt: skip
    assert len(lines) == 3 and all("\n" not in line for line in lines)
    look, mps, held_out = lines
    assert look.startswith(
        "latent_lpips is left out of segments, endpoints, preference, matching: "
        "'scorers/latent_lpips' is not on disk; name its weights by "
        "--config.stages.segments.terms.latent_lpips.weights"
    )
    assert mps.startswith("preference (mps) is left out of preference: 'scorers/mps' is not on")
    assert "--config.stages.preference.terms.preference.scorers.mps.weights" in mps
    assert held_out.startswith("preference (its held-out reward, image_reward) is left out of")


def test_what_is_there_is_kept(config, tmp_path, monkeypatch):
    (tmp_path / "scorers/mps").mkdir(parents=True)
    monkeypatch.setattr("tlcm_jax.config.optional_terms.is_latent_lpips", lambda folder: True)
    found, lines = without_missing(config)
    assert len(lines) == 1 and "image_reward" in lines[0]
    term = read(found).stages["preference"].terms["preference"]
    assert set(term.scorers) == {"mps"} and term.held_out == ""
    assert "latent_lpips" in read(found).stages["segments"].terms
    (tmp_path / "scorers/image_reward").mkdir()
    found, lines = without_missing(config)
    assert found == config and lines == []
    config["stages"]["preference"]["terms"]["preference"]["held_out_weights"] = "gs://bucket/there"
    assert without_missing(config)[1] == []


def test_full_goes_without_nothing(config, tmp_path):
    full = sdxl.get_config("full").to_dict()
    assert without_missing(full) == (full, [])
    term, world = read(full).stages["segments"].terms["latent_lpips"], world_of("eps", 1)
    with pytest.raises(FileNotFoundError, match="latent_lpips"):
        term.load(roles.model_of(world), world.networks, LoRAConfig())
    assert not latent_lpips_files.is_latent_lpips(tmp_path)


def test_what_is_no_recipe_is_left_to_the_schema():
    assert without_missing({"stages": 3}) == ({"stages": 3}, [])
    assert without_missing({"stages": {"a": {"terms": None}}}) == (
        {"stages": {"a": {"terms": None}}}, []
    )  # fmt: skip
