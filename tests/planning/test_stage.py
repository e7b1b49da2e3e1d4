"""Plans against the programs that they are plans of."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from configs import emoji, sdxl
from tlcm_jax.config.build import initial_trainable, stage_spec
from tlcm_jax.config.run import frozen_params
from tlcm_jax.config.schema import read
from tlcm_jax.families.load import abstract_model
from tlcm_jax.planning import report
from tlcm_jax.planning.cost import Compiler, Cost
from tlcm_jax.planning.flops import count
from tlcm_jax.planning.stage import Planner, _without_files
from tlcm_jax.planning.topologies import read_topology
from tlcm_jax.training.mesh import make_mesh
from tlcm_jax.training.stage import Stage

PAPER = emoji.get_config("paper").to_dict()


def make_planner(topology="h100:2", **changes):
    config = emoji.get_config("paper").to_dict()
    config["adapter"] |= {"merged": False}
    settings = read({**config, **changes})
    where = read_topology(topology)
    model = abstract_model(settings.model.path)
    return Planner(settings, model, where, Compiler(device=where.device, dtype=jnp.float32))


@pytest.fixture(scope="module")
def planner():
    return make_planner()


def leaves_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_blocks_are_the_network(planner):
    model, blocks = planner.model, planner.blocks
    time = jax.ShapeDtypeStruct((1,), jnp.int32)
    whole = count(model.predict, model.params["unet"], planner.latents, time, planner.conditioning)
    assert planner.network(1).flops == whole
    assert any(block.calls > 1 for block in blocks)
    inits = [jax.eval_shape(b.module.init, jax.random.key(0), *b.inputs) for b in blocks]
    sizes = [leaves_bytes(init) for init in inits]
    # Each call has weights of its own.
    held = sum(block.calls * size for block, size in zip(blocks, sizes, strict=True))
    assert held == leaves_bytes(model.params["unet"])


@pytest.mark.parametrize("name", ["segments", pytest.param("endpoints", marks=pytest.mark.slow)])
def test_operations_are_those_of_the_traced_programs(planner, name):
    settings, model = planner.settings, planner.model
    mesh = make_mesh({"data": -1}, jax.devices()[:2])
    spec = stage_spec(name, settings.stages[name], planner.losses[name], mesh, lambda r: None, {})
    prepared = Stage(spec, None)
    adapter = jax.eval_shape(lambda: initial_trainable(settings, model, jax.random.key(0)))
    state = jax.eval_shape(lambda a: spec.create_state(a, jax.random.key(0)), adapter)
    frozen = frozen_params(model, planner.conditioning)
    refill = settings.stages[name].refill
    rows = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((refill, *x.shape[1:]), x.dtype), planner.conditioning
    )
    arguments = (adapter, frozen, {"conditioning": rows}, state.key, jnp.uint32(0))
    made = jax.eval_shape(prepared.stream.refill, *arguments)
    pairs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), made)
    wanted = count(prepared.stream.refill, *arguments) / spec.pairs.steps_per_refill
    wanted += count(prepared.update, state, frozen, pairs)
    found = planner.plan(name).flops * planner.topology.devices
    assert found == pytest.approx(wanted, rel=0.05)


def test_memory_is_that_of_the_trees(planner):
    plan = planner.plan("segments")
    base = leaves_bytes(planner.model.params["unet"])
    assert plan.memory["frozen weights"] == base
    adapter = plan.memory["gradients"]
    # Weights and two moments, and the counts of steps.
    assert plan.memory["trained weights, optimiser"] == pytest.approx(3 * adapter, rel=1e-3)
    assert plan.memory["activations kept"] > 0
    assert plan.collectives == {"gradients summed": adapter}  # 2 (n - 1) / n of it, n = 2
    cached = make_planner(text_cache="somewhere").plan("segments").memory
    texts = leaves_bytes(planner.model.text_params)
    assert plan.memory["text encoders, decoder"] - cached["text encoders, decoder"] == texts > 0
    # The student's weights are merged once for all steps of a rollout.
    assert planner.plan("endpoints").memory["merged weights"] == base
    assert sum(plan.memory.values()) == plan.peak


def test_split_weights_are_gathered(planner):
    split = make_planner(mesh={"data": 1, "fsdp": 2}).plan("segments")
    whole = planner.plan("segments")
    # Small leaves lie whole on both devices (`training.sharding`).
    leaves = jax.tree.leaves(planner.model.params["unet"])
    halved = sum(leaf.size * 4 // (2 if leaf.size >= 2**16 else 1) for leaf in leaves)
    assert split.memory["frozen weights"] == halved
    what = "trained weights, optimiser"
    assert split.memory[what] < whole.memory[what]
    assert split.collectives["weights gathered"] > split.memory["frozen weights"]


def test_what_does_not_divide_is_told():
    with pytest.raises(ValueError, match="a mesh of data=3, fsdp=1 does not fit 2 devices"):
        make_planner(mesh={"data": 3})
    with pytest.raises(ValueError, match="cannot divide: set it to 32"):
        make_planner("h100:32").plan("segments")  # before anything is compiled


def test_costs_are_kept(planner, tmp_path):
    device = read_topology("h100").device
    told = []
    compiler = Compiler(device=device, store=tmp_path, progress=told.append)
    block = next(b for b in planner.blocks if "Resnet" in b.kind)
    first = compiler.forward(block, 2)
    assert compiler.forward(block, 2) == first and len(told) == 1
    compiler.forward(block, 4)
    assert len(told) == 2
    assert len(list(tmp_path.glob("*.json"))) == 2
    assert json.loads(next(tmp_path.glob("*.json")).read_text())["seconds"] > 0


def test_a_block_is_told_from_another_of_its_kind(planner, monkeypatch):
    """With a compiler in which everything takes twice the roofline's time, so do all blocks."""
    where = read_topology("v5e:1x1")
    told = []

    def twice(self, program):
        told.append(program.block)
        bound = self.device.roofline(program.flops, program.moved)
        return Cost(seconds=2 * bound, flops=program.flops, temporaries=program.moved)

    monkeypatch.setattr(Compiler, "_compile", twice)
    compiler = Compiler(device=where.device, dtype=jnp.float32)
    few = Planner(planner.settings, planner.model, where, compiler)
    cost = few.network(2)
    kinds = len(told)
    assert kinds < len(few.blocks)
    fresh = Compiler(device=where.device, dtype=jnp.float32)
    every = Planner(planner.settings, planner.model, where, fresh, every_block=True)
    exact = every.network(2)
    assert len(told) == kinds + len(every.blocks)
    assert cost.seconds == pytest.approx(exact.seconds) and cost.flops == exact.flops
    # Half the batch is told from the whole.
    assert few.network(1).seconds == pytest.approx(every.network(1).seconds)
    assert len(told) == kinds + 2 * len(every.blocks)


def test_stored_paths_ask_the_teacher_nothing(planner):
    stages = {"segments": {**PAPER["stages"]["segments"], "paths": "somewhere"}}
    stored = make_planner(stages=stages, stage_order=["segments"]).plan("segments")
    drawn = planner.plan("segments")
    assert "teacher" in drawn.seconds and "teacher" not in stored.seconds
    assert stored.flops < drawn.flops


def test_words(planner):
    plan, where = planner.plan("segments"), planner.topology
    text = report.describe_stage(plan, where, "blocks")
    assert "of 75: fits" in text and "MFU" in text
    huge = dataclasses.replace(plan, memory={**plan.memory, "activations kept": 10**12})
    assert not report.fits(huge, where)
    assert report.advice(huge, where, "none") == 'set model.remat = "blocks"'
    assert report.advice(huge, where, "blocks") == 'set model.remat = "all"'
    assert "stages.segments.accumulate" in report.advice(huge, where, "all")
    heavy = dataclasses.replace(plan, memory={**plan.memory, "frozen weights": 140 * 10**9})
    assert report.advice(heavy, where, "all") == "split the weights: set mesh.fsdp = 2"
    hours = 640 * plan.step_seconds / 3600
    said = report.describe_recipe([plan], where, 3.0)
    assert f"{2 * hours:.1f} chip-hours, {6 * hours:.2f} at 3 a chip-hour" in said


def test_terms_that_read_files_are_left_out_and_named():
    _, left_out = _without_files(read(sdxl.get_config("full").to_dict()))
    assert left_out["preference"] == ["latent_lpips", "preference"]
    assert left_out["matching"] == ["latent_lpips"]
