"""A training on pairs that were drawn before is the training that draws them."""

import json

import jax
import numpy as np
import pytest

from tests.support import toy_family
from tests.support.toy_family import write_toy
from tlcm_jax import teacher_paths
from tlcm_jax.config.run import train
from tlcm_jax.data.pair_store import PairStore
from tlcm_jax.families import load


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    (folder / "prompts.txt").write_text("\n".join(["a red cat", "an icon", "ice"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "FAMILIES", dict(load.FAMILIES))
        toy_family.register()
        write_toy(folder / "teacher")
        yield folder


def config(world, **changes):
    # 8 prompts make 24 pairs, 3 updates of 8: the fourth comes from the second refill.
    stage = dict(
        objective="mlcd",
        steps=4,
        batch_size=8,
        prompts_per_refill=8,
        learning_rate=1e-3,
        settings=dict(segments=2, points_per_segment=1, target_time="uniform"),
    )
    # The second stage: the store must know its keys and the order of its prompts.
    first = dict(stage, steps=1)
    return dict(
        name="toy",
        seed=3,
        model=dict(path=str(world / "teacher")),
        prompts=[str(world / "prompts.txt")],
        adapter=dict(rank=2, alpha=4.0, targets=["fc1", "fc2"]),
        stages=dict(first=first, paths=stage | changes),
        stage_order=["first", "paths"],
        log_every=1,
        export=[],
    )


def trained(world, folder, **changes):
    result = train(config(world, **changes), folder, progress=False)
    rows = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return jax.tree.map(np.asarray, result.adapter), [row["loss"] for row in rows]


def test_stored_pairs_train_as_drawn_ones_do(world, tmp_path, monkeypatch):
    store = str(tmp_path / "pairs")
    # Two jobs that know nothing of one another; the first is stopped once, and goes on.
    whole = PairStore.mark

    def stopped(self, refill):
        raise KeyboardInterrupt

    monkeypatch.setattr(PairStore, "mark", stopped)
    with pytest.raises(KeyboardInterrupt):
        teacher_paths.run(config(world), "paths", store, refills=2, part="0/2", dtype="float32")
    monkeypatch.setattr(PairStore, "mark", whole)
    assert PairStore(store).done == frozenset()
    teacher_paths.run(config(world), "paths", store, refills=2, part="0/2", dtype="float32")
    with pytest.raises(ValueError, match="holds 1 of 2 refills"):
        train(config(world, paths=store), tmp_path / "early", progress=False)
    teacher_paths.run(config(world), "paths", store, refills=2, part="1/2", dtype="float32")

    drawn, drawn_losses = trained(world, tmp_path / "drawn")
    read, read_losses = trained(world, tmp_path / "read", paths=store)
    # Bit for bit: nothing but the place of the pairs differs.
    assert read_losses == drawn_losses
    jax.tree.map(np.testing.assert_array_equal, read, drawn)
    # Rates and the number of updates may change, over the end of what is stored too; what the
    # pairs depend on may not.
    trained(world, tmp_path / "longer", paths=store, steps=7, learning_rate=1e-4)
    other = dict(segments=2, points_per_segment=1, target_time="uniform", skip=10)
    with pytest.raises(ValueError, match="drawn otherwise.*settings.skip: 20 -> 10"):
        train(config(world, paths=store, settings=other), tmp_path / "other", progress=False)
    changed = config(world, paths=store)
    changed["prompts"] = [str(tmp_path / "prompts.txt")]
    (tmp_path / "prompts.txt").write_text("a cat")
    with pytest.raises(ValueError, match="inputs.prompts"):
        train(changed, tmp_path / "prompts", progress=False)


def test_cached_texts_train_as_encoded_ones_do(world, tmp_path, monkeypatch):
    changed = config(world) | dict(text_cache=str(tmp_path / "texts"))

    def run(folder, raw):
        raw["stages"] = {"first": raw["stages"]["first"]}
        raw["stage_order"] = ["first"]
        result = train(raw, tmp_path / folder, progress=False)
        return result, jax.tree.map(np.asarray, result.adapter)

    _, encoded = run("encoded", config(world))
    result, cached = run("cached", dict(changed))
    jax.tree.map(np.testing.assert_array_equal, cached, encoded)
    # The encoders have left the devices.
    leaves = jax.tree.leaves(result.model.text_params)
    assert leaves and not any(isinstance(leaf, jax.Array) for leaf in leaves)
    # A second run encodes nothing; another recipe's texts are refused.
    monkeypatch.setattr(PairStore, "write", None)
    changed = config(world) | dict(text_cache=str(tmp_path / "texts"))
    run("again", dict(changed))
    (tmp_path / "other.txt").write_text("a cat")
    changed["prompts"] = [str(tmp_path / "other.txt")]
    with pytest.raises(ValueError, match="of another recipe \\(other described"):
        run("other", dict(changed))


def test_mistakes_are_told_in_one_line(world, tmp_path):
    asked = dict(output=str(tmp_path / "p"), refills=1)
    with pytest.raises(ValueError, match="--part '3/3': write it like 0/8"):
        teacher_paths.run(config(world), "paths", part="3/3", **asked)
    with pytest.raises(ValueError, match="--stage 'x': the recipe has first, paths"):
        teacher_paths.run(config(world), "x", **asked)
    student = config(world, objective="lcd", settings=dict(segments=2, rollout_timesteps=[999]))
    with pytest.raises(ValueError, match="cannot be stored: they depend on the student"):
        teacher_paths.run(student, "paths", **asked)
    with pytest.raises(ValueError, match="made without their prompts"):
        teacher_paths.run(config(world, unconditional=0.1), "paths", **asked)
    with pytest.raises(ValueError, match="stages.paths.paths.*cannot be stored"):
        student["stages"]["paths"]["paths"] = str(tmp_path)
        train(student, tmp_path / "run", progress=False)
