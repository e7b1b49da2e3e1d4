"""A latent LPIPS learns a ranking, from BAPPS' files to the folder that the term reads."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from PIL import Image

from tests.support.tiny_pipeline import write_tiny_pipeline
from tlcm_jax import train_latent_lpips as command
from tlcm_jax.data.bapps import bapps_triplets
from tlcm_jax.distillation import ranking
from tlcm_jax.io.latent_lpips_files import load_latent_lpips
from tlcm_jax.models.latent_lpips import LatentLPIPS


def test_agreement_is_the_judges_share_on_the_ranking_s_side():
    verdict = jnp.array([1.0, 0.0, 0.75, 0.75])
    difference = jnp.array([0.3, -0.2, 0.1, -0.1])
    np.testing.assert_allclose(ranking.agreement(difference, verdict), (1 + 1 + 0.75 + 0.25) / 4)


def test_the_ranking_loss_is_least_where_the_ranking_is_right():
    network = LatentLPIPS((2,) * 5)
    z = jax.random.normal(jax.random.key(0), (8, 4, 4, 4))
    batch = dict(reference=z, first=z + 0.5, second=z + 0.05, verdict=jnp.ones(8))
    params = jax.jit(network.init)(jax.random.key(1), z, z)["params"]
    loss = jax.jit(ranking.ranking_loss(network))
    both = {"network": params, "slope": jnp.log(10.0)}
    right, told = loss(both, batch, jax.random.key(0))
    wrong, _ = loss(both, dict(batch, verdict=jnp.zeros(8)), jax.random.key(0))
    assert told["agreement"] == 1.0 and float(right) < np.log(2) < float(wrong)


def write_bapps(folder, count, side=32):
    """Triplets whose second picture is nearer, or whose first is, as the verdict says."""
    random = np.random.default_rng(len(folder.parts))
    for part in ("ref", "p0", "p1", "judge"):
        (folder / "cnn" / part).mkdir(parents=True)
    for i in range(count):
        reference = random.integers(64, 192, (side, side, 3))
        share = float(i % 2)
        for part, size in (("ref", 0), ("p0", 60 * share + 3), ("p1", 63 - 60 * share)):
            noise = random.normal(0, max(size, 1e-9), reference.shape)
            pixels = np.clip(reference + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "cnn" / part / f"{i:06}.png")
        np.save(folder / "cnn" / "judge" / f"{i:06}.npy", np.array([share], np.float32))


def test_the_command_trains_on_bapps(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "_TESTED", 2)
    monkeypatch.setattr(command, "LatentLPIPS", lambda: LatentLPIPS((4,) * 5))
    model = write_tiny_pipeline(tmp_path / "tiny")
    for part in ("train", "val"):
        write_bapps(tmp_path / "2afc" / part, 8)
    values = flags.FlagValues()
    command.define_flags(values)
    values(
        [
            "train_latent_lpips", f"--bapps={tmp_path / '2afc'}", f"--model={model}",
            f"--output={tmp_path / 'out'}", f"--workdir={tmp_path / 'run'}", "--steps=30",
            "--batch=8", "--learning_rate=3e-3",
        ]
    )  # fmt: skip
    command.run(values)
    network, _ = load_latent_lpips(tmp_path / "out")
    assert network.widths == (4,) * 5
    scores = json.loads((tmp_path / "out" / "config.json").read_text())["scores"]
    assert scores["latent_lpips"] > 0.9
    assert "agreement with people" in capsys.readouterr().out


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no BAPPS triplets"):
        bapps_triplets(tmp_path, lambda x: x, 2, 0)
    write_bapps(tmp_path, 2)
    (tmp_path / "cnn" / "judge" / "000001.npy").unlink()
    with pytest.raises(FileNotFoundError, match="000001.npy is missing beside"):
        bapps_triplets(tmp_path, lambda x: x, 2, 0)
