"""Reading: shards, variants, older names, dtypes, devices, and how much memory it takes."""

import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tlcm_jax.families.load import load_model
from tlcm_jax.io import names
from tlcm_jax.io.placement import to_devices, to_host
from tlcm_jax.io.tensors import TensorFile
from tlcm_jax.training.mesh import make_mesh
from tlcm_jax.training.sharding import tree_shardings

UNET = "unet/diffusion_pytorch_model.safetensors"


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def shard(path, variant=""):
    """The file cut in two, as diffusers does above a size."""
    tensors = load_file(path)
    half = len(tensors) // 2
    stem = path.name.removesuffix(".safetensors")
    where = {}
    for i, keys in enumerate((list(tensors)[:half], list(tensors)[half:]), 1):
        name = f"{stem}{variant}-0000{i}-of-00002.safetensors"
        save_file({key: tensors[key] for key in keys}, path.parent / name)
        where.update({key: name for key in keys})
    path.unlink()
    index = path.parent / f"{stem}.safetensors.index{variant}.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards(copy, teacher, variant):
    shard(copy / UNET, variant)
    assert not (copy / UNET).exists()
    again = load_model(copy, on_device=False)
    jax.tree.map(np.testing.assert_array_equal, again.params["unet"], teacher.params["unet"])
    (copy / f"unet/diffusion_pytorch_model{variant}-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="00002-of-00002.safetensors is not a readable"):
        load_model(copy, on_device=False)


def test_tensor_in_two_shards(tmp_path):
    for name in ("a", "b"):
        save_file({"x": np.zeros(2)}, tmp_path / name)
    with pytest.raises(ValueError, match="b holds x once more"):
        TensorFile([tmp_path / "a", tmp_path / "b"])


def test_variant(copy, teacher):
    for path in copy.glob("*/*.safetensors"):
        other = path.with_name(path.name.replace(".safetensors", ".ema.safetensors"))
        save_file({key: 2 * value for key, value in load_file(path).items()}, other)
    jax.tree.map(
        lambda ours, plain: np.testing.assert_array_equal(ours, 2 * plain),
        load_model(copy, on_device=False, variant="ema").params, teacher.params,
    )  # fmt: skip
    jax.tree.map(
        np.testing.assert_array_equal, load_model(copy, on_device=False).params, teacher.params
    )
    with pytest.raises(
        FileNotFoundError, match=r"model.int8.safetensors \(it has .*model.ema.safet"
    ):
        load_model(copy, on_device=False, variant="int8")


def test_ten_problems_of_every_kind_are_named(copy):
    def damage(tensors):
        for key in [key for key in tensors if "mid_block" in key][:6]:
            del tensors[key]
        for i in range(3):
            tensors[f"down_blocks.{i + 7}.weight"] = np.zeros(1, np.float32)
        tensors["conv_in.weight"] = np.zeros((32, 9, 3, 3), np.float32)
        tensors["conv_out.bias"] = np.zeros(3, np.float32)
        tensors["text_model.embeddings.position_ids"] = np.zeros((1, 77), np.int64)

    rewrite(copy / UNET, damage)
    with pytest.raises(ValueError, match="unet does not fit its config: ") as error:
        load_model(copy)
    message = str(error.value)
    assert message.count("missing mid_block") == 6 and message.count("unexpected down_") == 3
    shapes = [m for m in ("conv_in.weight has shape", "conv_out.bias has shape") if m in message]
    assert len(shapes) == 1 and message.endswith("; and 1 more")
    assert re.search(r"has shape \((32, 9, 3, 3|3,)\), expected \((32, 4, 3, 3|4,)\)", message)
    assert "position_ids" not in message


def test_older_and_newer_names(copy, teacher):
    """The autoencoder as SD 1.x was published; a tower as transformers 5.6 and later saves it."""
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def older(tensors):
        for key in [key for key in tensors if ".attentions.0." in key]:
            value = tensors.pop(key)
            for new, old in former.items():
                key = key.replace(f".{new}.", f".{old}.")
            if value.ndim == 2:
                value = value[:, :, None, None]
            tensors[key] = value

    def newer(tensors):
        for key in list(tensors):
            tensors[key.removeprefix("text_model.")] = tensors.pop(key)

    rewrite(copy / "vae/diffusion_pytorch_model.safetensors", older)
    rewrite(copy / "text_encoder/model.safetensors", newer)
    again = load_model(copy, on_device=False)
    jax.tree.map(np.testing.assert_array_equal, again.params, teacher.params)


@pytest.mark.parametrize("axes", [None, {"data": 1, "fsdp": 8}, {"data": 8}])
def test_straight_to_devices_in_the_dtype_asked_for(tiny, teacher, axes):
    mesh = None if axes is None else make_mesh(axes)
    shardings = None if mesh is None else lambda tree: tree_shardings(tree, mesh)
    pipeline = load_model(tiny, param_dtype=jnp.bfloat16, shardings=shardings)
    if mesh is not None:
        wanted = tree_shardings(teacher.params, mesh)
        jax.tree.map(lambda leaf, where: _assert_lies(leaf, where), pipeline.params, wanted)
    jax.tree.map(
        lambda leaf, whole: np.testing.assert_array_equal(
            np.asarray(leaf), whole.astype(ml_dtypes.bfloat16)
        ),
        pipeline.params, teacher.params,
    )  # fmt: skip


def _assert_lies(leaf, sharding):
    assert isinstance(leaf, jax.Array) and leaf.sharding == sharding


def test_weights_do_not_change_with_the_file(copy):
    path = copy / UNET
    loaded = [load_model(copy, on_device=on_device).params["unet"] for on_device in (False, True)]
    before = [jax.tree.map(lambda x: np.array(x, copy=True), params) for params in loaded]
    with path.open("r+b") as stream:
        stream.seek(path.stat().st_size // 2)
        stream.write(b"\x3f" * 100_000)
    for params, kept in zip(loaded, before, strict=True):
        jax.tree.map(np.testing.assert_array_equal, params, kept)


@pytest.mark.parametrize("place", [to_host, to_devices])
def test_loading_holds_one_tensor_beside_the_weights(tmp_path, place):
    """Peak resident memory, as the kernel counts it: 12 tensors of 8 MB in fp32, kept as bf16."""
    rows, columns, count = 2048, 1024, 12
    shapes = {
        f"layer_{i}": {"kernel": jax.ShapeDtypeStruct((rows, columns), ml_dtypes.bfloat16)}
        for i in range(count)
    }
    path = tmp_path / "weights.safetensors"
    # The first run starts the runtime's threads and imports.
    for tree in ({"layer_0": shapes["layer_0"]}, shapes):
        save_file({f"{name}.weight": np.ones((columns, rows), np.float32) for name in tree}, path)
        tensors = TensorFile([path])
        views = names.match_tensors(tensors, tree, "test")
        before = _reset_peak()
        params = place(views, tree, tensors.release)
        grown = _memory("VmHWM") - before
        del tensors, views
    kept, one = sum(leaf.nbytes for leaf in jax.tree.leaves(params)), 4 * rows * columns
    assert kept == count * one // 2
    # One tensor as it is stored and one as it is kept; 4 MB for the allocator's rounding.
    assert grown < kept + one + one // 2 + 4e6, (grown, kept)


@pytest.mark.parametrize("large", ["first", "last"])
def test_small_tensors_do_not_add_up_to_more_than_the_large_one(tmp_path, large):
    """Several are laid out at once; what they take beside their places stays within one."""
    sides = {"large": 3072, **{f"small_{i}": 1024 for i in range(20)}}
    if large == "last":
        sides = dict(reversed(sides.items()))
    shapes = {
        name: {"kernel": jax.ShapeDtypeStruct((side, side), ml_dtypes.bfloat16)}
        for name, side in sides.items()
    }
    path = tmp_path / "weights.safetensors"
    for tree in ({"large": shapes["large"]}, shapes):
        save_file(
            {f"{name}.weight": np.ones((sides[name],) * 2, ml_dtypes.bfloat16) for name in tree},
            path,
        )
        tensors = TensorFile([path])
        views = names.match_tensors(tensors, tree, "test")
        before = _reset_peak()
        params = to_devices(views, tree, tensors.release)
        grown = _memory("VmHWM") - before
        del tensors, views
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert grown < kept + 2 * sides["large"] ** 2 + 4e6, (grown, kept)


def _memory(field):
    with open("/proc/self/status") as stream:
        return 1024 * int(re.search(rf"{field}:\s+(\d+)", stream.read())[1])


def _reset_peak():
    try:
        with open("/proc/self/clear_refs", "w") as stream:
            stream.write("5")
    except OSError:
        pytest.skip("this kernel does not reset the peak of resident memory")
    return _memory("VmRSS")
