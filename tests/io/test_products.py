"""Exports from a run's workdir, through the commands: products, cards, pictures, messages."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import flags
from PIL import Image

from tests.support.tiny_pipeline import random_adapter
from tlcm_jax import export, sample
from tlcm_jax.config.workdir import CHECKPOINTS, load_adapter
from tlcm_jax.families.load import abstract_model, load_model
from tlcm_jax.families.stable_diffusion import LORA_NAMES
from tlcm_jax.io.lora_files import read_lora
from tlcm_jax.io.model_card import Recipe, model_card
from tlcm_jax.io.names import match_tensors
from tlcm_jax.io.placement import to_host
from tlcm_jax.io.tensors import open_component
from tlcm_jax.models import lora
from tlcm_jax.models.adapters import svd_extract
from tlcm_jax.training.checkpoints import Checkpoints
from tlcm_jax.training.positions import Position
from tlcm_jax.training.state import create

RANK, ALPHA = 2, 8.0
KOHYA_FILE, SINGLE_FILE = "tlcm_kohya.safetensors", "tlcm_checkpoint.safetensors"


@pytest.fixture(scope="module")
def workdir(tiny, tmp_path_factory):
    """A run of two checkpoints; in the second, every factor is twice the first's."""
    folder = tmp_path_factory.mktemp("run")
    config = {
        "name": "tiny",
        "model": {"path": str(tiny)},
        "prompts": ["prompts.txt"],
        "adapter": {"rank": RANK, "alpha": ALPHA},
        "stages": {
            "segments": {
                "objective": "mlcd", "steps": 2, "batch_size": 4,
                "learning_rate": 1e-4, "settings": {"guidance_scale": 5.0},
            }
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    checkpoints = Checkpoints(folder / CHECKPOINTS)
    for step in (1, 2):
        tree = jax.tree.map(lambda x, step=step: jnp.asarray(step * x), adapter_of(tiny))
        state = create(tree, optax.sgd(1e-3), jax.random.key(0))
        checkpoints.save(Position(0, "segments", step, step), state)
    checkpoints.close()
    return folder


def adapter_of(folder):
    unet = abstract_model(folder).params["unet"]
    shapes = jax.eval_shape(lambda key: lora.init(unet, lora.TARGETS, RANK, key), jax.random.key(0))
    return random_adapter(shapes, np.random.default_rng(3))


def run(command, *arguments):
    """Runs a command's work with the flags that a shell would pass."""
    values = flags.FlagValues()
    command.define_flags(values)
    values(["command", *map(str, arguments)])
    command.run(values)


def assert_trees_equal(ours, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, ours), expected)


def test_adapter_of_a_workdir(workdir, tiny):
    expected = adapter_of(tiny)
    config, newest = load_adapter(workdir)
    assert config["model"]["path"] == str(tiny)
    assert_trees_equal(newest, lora.scaled(jax.tree.map(lambda x: 2 * x, expected), ALPHA / RANK))
    _, first = load_adapter(workdir, 1)
    assert_trees_equal(first, lora.scaled(expected, ALPHA / RANK))
    with pytest.raises(FileNotFoundError, match="no checkpoint 7 .* it has 1, 2"):
        load_adapter(workdir, 7)
    with pytest.raises(FileNotFoundError, match="is not a workdir"):
        load_adapter(tiny)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "must hold a JSON object, not a list"),
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON: nested too deeply"),
    ],
)
def test_a_damaged_config_of_a_run_is_named(workdir, tmp_path, content, message):
    (tmp_path / CHECKPOINTS).mkdir()
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"config.json {message}"):
        load_adapter(tmp_path)
    with pytest.raises(ValueError, match=f"config.json {message}"):
        run(sample, "--model", tmp_path, "--prompt", "a cat", "--output", tmp_path / "out.png")


def test_export_command(workdir, tiny, tmp_path, capsys):
    arguments = ("--workdir", workdir, "--to", "lora,kohya,pipeline", "--output", tmp_path)
    run(export, *arguments, "--dtype", "fp32", "--step", 1)
    _, adapter = load_adapter(workdir, 1)
    teacher = load_model(tiny, on_device=False).params["unet"]
    files = {
        "lora": tmp_path / "lora" / "pytorch_lora_weights.safetensors",
        "kohya": tmp_path / "kohya" / KOHYA_FILE,
    }
    printed = capsys.readouterr().out
    for target, path in files.items():
        assert f"{target}: {path}" in printed
        assert_trees_equal(read_lora(path, teacher, LORA_NAMES), jax.tree.map(np.asarray, adapter))
    student = load_model(tmp_path / "pipeline", on_device=False)
    merged = jax.tree.map(np.asarray, lora.merge(teacher, adapter))
    assert_trees_equal(student.params["unet"], merged)
    # Exported again, of the newest checkpoint: in the old one's place.
    run(export, *arguments[:3], "lora", *arguments[4:], "--dtype", "fp32")
    _, newest = load_adapter(workdir)
    assert_trees_equal(
        read_lora(files["lora"], teacher, LORA_NAMES), jax.tree.map(np.asarray, newest)
    )


def test_cards(workdir, tmp_path):
    run(export, "--workdir", workdir, "--to", "lora,kohya", "--output", tmp_path)
    card = (tmp_path / "lora" / "README.md").read_text()
    for wanted in (
        "# tiny, distilled to 1 to 8 steps by TLCM\n",
        "LoRA of rank 2",
        "Distilled from `tiny`",
        "| 4 | 999, 749, 499, 124 |",
        "guidance_scale=0",
        "load_lora_weights",
        "original_inference_steps=8",
        "guidance_scale = 5,",
        "steps = 2, batch_size = 4,",
        "learning_rate = 0.0001",
        "the teacher's, scale 5, is distilled in",
        "## Scale",
        "The teacher's licence applies",
    ):
        assert wanted in card
    assert str(tmp_path.parent) not in card  # nor any other path of this machine
    compile(card.split("```python\n")[1].split("```")[0], "card", "exec")
    assert KOHYA_FILE in (tmp_path / "kohya" / "README.md").read_text()


def test_single_file_and_unet_come_back_bit_for_bit(workdir, tiny, tmp_path):
    run(export, "--workdir", workdir, "--to", "unet,single-file,pipeline", "--output", tmp_path,
        "--dtype", "fp16")  # fmt: skip
    pipeline = load_model(tmp_path / "pipeline", on_device=False)
    single = load_model(tmp_path / "single-file" / SINGLE_FILE, on_device=False)
    jax.tree.map(np.testing.assert_array_equal, single.params, pipeline.params)
    assert single.configs["scheduler"]["_class_name"] == "LCMScheduler"
    tensors = open_component(tmp_path / "unet", "diffusion_pytorch_model")
    assert_trees_equal(
        to_host(
            match_tensors(tensors, pipeline.params["unet"], "unet"),
            pipeline.params["unet"],
            lambda: None,
        ),
        pipeline.params["unet"],
    )
    for target in ("unet", "single-file"):
        card = (tmp_path / target / "README.md").read_text()
        compile(card.split("```python\n")[1].split("```")[0], "card", "exec")
        assert "| 8 | 999, 874, 749" in card and "## Scale" not in card


def test_whole_weights_of_a_run(workdir, tiny, tmp_path, capsys):
    """A checkpoint of a full fine-tune: exported as it is, and as an extracted LoRA."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text((workdir / "config.json").read_text())
    teacher = load_model(tiny, on_device=False).params["unet"]
    tuned = lora.merge(teacher, adapter_of(tiny))
    tuned["conv_in"]["bias"] = tuned["conv_in"]["bias"] + np.float32(0.001)
    checkpoints = Checkpoints(folder / CHECKPOINTS)
    state = create(jax.tree.map(jnp.asarray, tuned), optax.sgd(1e-3), jax.random.key(0))
    checkpoints.save(Position(0, "segments", 1, 1), state)
    checkpoints.close()
    arguments = ("--workdir", folder, "--output", tmp_path, "--dtype", "fp32", "--rank", 3)
    run(export, *arguments, "--to", "lora,unet")
    tensors = open_component(tmp_path / "unet", "diffusion_pytorch_model")
    views = match_tensors(tensors, teacher, "unet")
    assert_trees_equal(to_host(views, teacher, lambda: None), tuned)
    printed = capsys.readouterr().out
    missed = float(printed.split("misses ")[1].split("%")[0]) / 100
    read = read_lora(tmp_path / "lora" / "pytorch_lora_weights.safetensors", teacher, LORA_NAMES)
    expected, error = svd_extract(teacher, tuned, 3)
    assert_trees_equal(lora.merge(teacher, read), lora.merge(teacher, expected))
    assert missed == pytest.approx(error, abs=6e-5) and 0 < missed < 0.1  # a rank-2 change, a bias
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "LoRA of rank 3" in card and f"misses {error:.1%} of it" in " ".join(card.split())


@pytest.mark.parametrize(
    ("teacher", "call"),
    [
        ("tiny", 'from_pretrained("path/to/tiny"'),
        ("someone/tiny", 'from_pretrained("someone/tiny"'),
        ("tiny.safetensors", 'from_single_file("path/to/tiny.safetensors"'),
    ],
)
def test_card_loads_its_teacher_as_it_was_given(teacher, call):
    recipe = Recipe(name="tiny", teacher=teacher, method="TLCM", times={4: (999, 749, 499, 124)})
    assert f"StableDiffusionXLPipeline.{call})" in model_card(recipe, "lora")
    assert f"StableDiffusionXLPipeline.{call}, unet=unet)" in model_card(recipe, "unet")


def test_export_refuses_before_it_works(workdir, tmp_path):
    def refused(kind, message, *more):
        with pytest.raises(kind, match=message):
            run(export, "--workdir", workdir, "--output", tmp_path, *more)

    refused(ValueError, "cannot export 'onnx'; choose from lora, kohya, unet", "--to", "onnx")
    refused(ValueError, "cannot export nothing", "--to", "")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "thesis.txt").write_text("")
    refused(FileExistsError, "already holds files", "--to", "lora")
    assert [path.name for path in (tmp_path / "lora").iterdir()] == ["thesis.txt"]


def test_sample_command(workdir, tmp_path):
    run(
        sample, "--model", workdir, "--prompt", "a cat", "--prompt", "a red cat", "--steps", 1,
        "--enlarge", 2, "--output", tmp_path / "out.png",
    )  # fmt: skip
    first, second = (np.asarray(Image.open(tmp_path / f"out-{i}.png")) for i in (0, 1))
    assert first.shape == second.shape == (64, 64, 3)
    assert np.array_equal(first[::2, ::2], first[1::2, 1::2])  # each pixel as it was drawn
    assert not np.array_equal(first, second)


def test_model_that_is_sampled(workdir, tiny, tmp_path):
    run(export, "--workdir", workdir, "--to", "kohya", "--output", tmp_path, "--dtype", "fp32")
    trained = sample.load_with_adapter(str(workdir)).adapter
    teacher, exported, _ = sample.load_with_adapter(
        str(tiny), [str(tmp_path / "kohya" / KOHYA_FILE)]
    )
    assert_trees_equal(exported, jax.tree.map(np.asarray, trained))
    assert teacher.source == str(tiny)
    assert sample.load_with_adapter(str(workdir), adapted=False).adapter is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", 9), "steps = 9: a distilled model samples in 1 to 8 steps"),
        (("--steps", 0), "1 to 8 steps"),
        (("--output", "out.txt"), "give a name that ends in .png"),
        (("--output", "nowhere/out.png"), "the folder nowhere does not exist"),
        (("--teacher", "--lora", "x.safetensors"), "leave out --lora"),
        ((), "model '/nowhere' is not a folder"),
    ],
)
def test_sample_refuses_before_it_loads(arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(sample, "--model", "/nowhere", "--prompt", "a cat", *arguments)
