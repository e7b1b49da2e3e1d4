"""Which kernel attention takes, and that splash computes what XLA does."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlcm_jax.models import attention as door
from tlcm_jax.models import splash
from tlcm_jax.models.attention import attention
from tlcm_jax.training.mesh import known_mesh, make_mesh

xla = functools.partial(jax.nn.dot_product_attention, implementation="xla")


def shaped(length=1024, heads=2, width=64, batch=1, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((batch, length, heads, width), dtype)


def drawn(shape, count=3):
    keys = jax.random.split(jax.random.key(0), count)
    return [jax.random.normal(key, shape.shape, shape.dtype) for key in keys]


def lowered(platform, function, *shapes):
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


def kernels(platform, query, key=None, function=attention):
    """Kernels, that are not XLA's own, of an attention compiled for a platform."""
    key = query if key is None else key
    text = lowered(platform, function, query, key, key)
    return text.count("tpu_custom_call"), text.count("__cudnn$fmha")


def test_the_choice_follows_the_platform_that_is_compiled_for(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    # cuDNN as it would be found on a GPU's host; nothing is run.
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(door, "_has_cudnn", lambda: True)
    assert kernels("tpu", shaped()) == (1, 0)
    assert kernels("cuda", shaped())[0] == 0 < kernels("cuda", shaped())[1]
    assert kernels("cpu", shaped()) == (0, 0)


@pytest.mark.parametrize(
    ("query", "key"),
    [
        (shaped(), shaped(77)),  # a prompt's tokens
        (shaped(512), None),  # short
        (shaped(dtype=jnp.float32), None),  # parity's
        (shaped(1024 + 8), None),  # no tile divides it
        (shaped(width=256), None),  # the decoder's single wide head, and the like
    ],
)
def test_all_else_is_xlas(query, key):
    assert kernels("tpu", query, key) == (0, 0)


def test_a_mask_is_xlas():
    masked = functools.partial(attention, mask=jnp.ones((1, 1, 1024, 1024), bool))
    assert kernels("tpu", shaped(), function=masked) == (0, 0)


def test_no_logits_are_kept_for_the_way_back_on_a_tpu():
    def total(q):
        return jnp.sum(attention(q, q, q).astype(jnp.float32))

    text = lowered("tpu", jax.grad(total), shaped())
    assert text.count("tpu_custom_call") == 2  # one kernel forward, one back
    # (Zeros of the logits' shape stand in for what other platforms keep; the compiler drops them.)
    assert not re.search(r"dot_general.*1024x1024x", text)


def test_compiles_for_a_v5e_and_holds_no_logits():
    pytest.importorskip("libtpu", reason="compiles for a TPU: pip install -e '.[plan]'")
    from tlcm_jax.planning.aot import single_device

    place = single_device("v5e:1x1")
    q = jax.ShapeDtypeStruct((1, 2048, 2, 64), jnp.bfloat16, sharding=place)

    def total(q, k, v):
        return jnp.sum(attention(q, k, v).astype(jnp.float32))

    compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(q, q, q).compile()
    # In bf16 the logits of both heads, alone, are 16 MiB.
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 2**20


# Outputs against XLA's in fp32, largest error over largest value: 1e-6 is fp32's own. In bf16 both
# round probabilities and outputs to 8 bits, at places of their own.
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 1e-2)])
def test_splash_is_attention_forward_and_backward(monkeypatch, dtype, tolerance):
    monkeypatch.setattr(splash, "TILES", splash.Tiles(128, 256, 128))
    splash._kernel.cache_clear()
    q, k, v, weight = drawn(shaped(256, dtype=dtype), 4)

    def run(function, *arrays):
        out, pull = jax.vjp(function, *arrays)
        return [out, *pull(weight.astype(out.dtype))]

    found = run(functools.partial(splash.attend, interpret=True), q, k, v)
    wanted = run(xla, *(x.astype(jnp.float32) for x in (q, k, v)))
    splash._kernel.cache_clear()
    for ours, theirs in zip(found, wanted, strict=True):
        error = np.max(np.abs(np.asarray(ours, np.float32) - np.asarray(theirs)))
        assert error <= tolerance * np.max(np.abs(theirs))


def test_each_device_runs_the_kernel_on_its_part_of_the_batch():
    mesh = make_mesh({"data": 4, "fsdp": 2}, jax.devices()[:8])
    with known_mesh(mesh):
        text = lowered("tpu", attention, *3 * [shaped(batch=8)])
        assert "tensor<1x2x1024x64xbf16>" in text and "tpu_custom_call" in text
        # The kernel cannot be cut unevenly.
        assert kernels("tpu", shaped(batch=4)) == (0, 0)


def test_tiles():
    assert splash.tiles_of(4096) == splash.TILES
    assert splash.tiles_of(1024 + 512).queries == 768
    assert splash.tiles_of(1000) is None
