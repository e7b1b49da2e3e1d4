"""Compiling for a TPU that is not there."""

import sys

import jax.numpy as jnp
import pytest

from configs import emoji
from tlcm_jax import plan
from tlcm_jax.config.schema import read
from tlcm_jax.families.load import abstract_model
from tlcm_jax.planning.cost import Compiler
from tlcm_jax.planning.stage import Planner
from tlcm_jax.planning.topologies import read_topology


def test_without_the_compiler_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    from tlcm_jax.planning import aot

    aot.devices.cache_clear()
    with pytest.raises(ValueError, match=r"pip install 'tlcm_jax\[plan\]'"):
        plan.run(emoji.get_config().to_dict(), "v5e:2x2")


def test_a_block_compiles_for_a_v5e():
    pytest.importorskip("libtpu", reason="compiles for a TPU: pip install -e '.[plan]'")
    settings, where = read(emoji.get_config().to_dict()), read_topology("v5e:1x1")
    model = abstract_model(settings.model.path, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    compiler = Compiler(device=where.device)
    planner = Planner(settings, model, where, compiler)
    block = next(b for b in planner.blocks if "Transformer" in b.kind)
    cost = compiler.gradient(block, 2, settings.adapter)
    # No faster than the peak; slower by no more than what so small a block is.
    assert 0 < cost.flops / where.device.peak < cost.seconds < 1e-3
    assert cost.kept > 0


def test_rooflines_need_none(capsys):
    plan.run(emoji.get_config("smoke").to_dict(), "h100:2", price=2.0)
    said = capsys.readouterr().out
    assert "emoji-xl on h100:2: 2 chips, mesh data 2 x fsdp 1" in said
    assert "at 2 a chip-hour" in said and "lower bounds" in said
