"""Readers of models: configs, weights, tokenizers, LoRAs; and the export of what was read.

A reader is called as the commands call it; but a config is read into its dataclass, and its network
traced now and then.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.fuzz.targets import Target
from tests.support.odd_inputs import TEXTS
from tests.support.tiny_pipeline import random_adapter, write_tiny_pipeline
from tlcm_jax.data.tokens import read_tokenizer, tokenize
from tlcm_jax.diffusion.scheduler_config import lcm_scheduler, process_from_config
from tlcm_jax.families.base import abstract_params
from tlcm_jax.families.load import abstract_model, find_family, load_model
from tlcm_jax.families.stable_diffusion import LORA_NAMES
from tlcm_jax.io import names
from tlcm_jax.io.files import save_tensors
from tlcm_jax.io.json_files import parse, read_object, write_json
from tlcm_jax.io.lora_export import write_lora
from tlcm_jax.io.lora_files import read_networks
from tlcm_jax.io.lora_sources import PEFT_CONFIG, PEFT_FILE
from tlcm_jax.io.model_card import teacher_licence
from tlcm_jax.io.pipeline_folder import check_components, write_pipeline
from tlcm_jax.io.pipeline_index import read_index
from tlcm_jax.io.placement import to_host
from tlcm_jax.io.single_file import LdmFile, write_single_file
from tlcm_jax.io.tensors import TensorFile, open_component
from tlcm_jax.models import lora
from tlcm_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from tlcm_jax.models.unet import UNet2DConditionModel
from tlcm_jax.models.unet_config import UNetConfig
from tlcm_jax.models.vae import AutoencoderKL, VAEConfig

# Of the cases of a config that is read, this share is traced.
_TRACED = 0.01


def models(folder: Path) -> Iterator[Target]:
    """A pipeline's files, a shard index, a single file; and what is exported of them."""
    model = write_tiny_pipeline(folder / "model")
    whole = load_model(model, on_device=False)
    kinds: dict[str, tuple[Any, Any]] = {
        "unet": (UNetConfig, UNet2DConditionModel),
        "vae": (VAEConfig, AutoencoderKL),
        "text_encoder_2": (CLIPTextConfig, CLIPTextModel),
    }
    for name, (config, network) in kinds.items():
        file = model / name / "config.json"

        def read(rng: random.Random, file: Path = file, c: Any = config, n: Any = network) -> None:
            found = parse(file, read_object(file), c.from_dict)
            if rng.random() < _TRACED:
                _traced(file, n(found))

        yield Target(name=f"{name} config", file=file, kind="json", read=read, weight=3)
    scheduler = model / "scheduler" / "scheduler_config.json"

    def read_scheduler(_: Any) -> None:
        raw = read_object(scheduler)
        process = parse(scheduler, raw, process_from_config)
        if hasattr(process, "alphas_cumprod"):
            # What is exported of it is what was read.
            again = process_from_config(lcm_scheduler(raw))
            if not np.array_equal(again.alphas_cumprod, process.alphas_cumprod):
                raise AssertionError("the exported schedule is another than the one read")

    yield Target(
        name="scheduler config", file=scheduler, kind="json", read=read_scheduler, weight=3
    )
    index = model / "model_index.json"

    def read_pipeline(_: Any) -> None:
        find_family(model)
        check_components(model)
        configs = {name: (whole.configs[name], None) for name in whole.params}
        target = folder / "model-out"
        shutil.rmtree(target, ignore_errors=True)
        write_pipeline(target, model, configs, kind="x", scheduler={"_class_name": "x"})
        read_index(target)

    yield Target(
        name="model index, exported", file=index, kind="json", read=read_pipeline, weight=3
    )
    (model / "README.md").write_text("---\nlicense: mit\n---\n# x\n")
    licence = model / "README.md"
    yield Target(
        name="teacher's card", file=licence, kind="bytes", read=lambda _: teacher_licence(model)
    )
    shapes = whole.params["text_encoder_2"]
    tower = model / "text_encoder_2"

    def read_weights(_: Any) -> None:
        tensors = open_component(tower, "model")
        to_host(names.match_tensors(tensors, shapes, "x"), shapes, tensors.release)

    weights = tower / "model.safetensors"
    yield Target(name="weights", file=weights, kind="safetensors", read=read_weights, weight=4)
    sharded = folder / "sharded"
    sharded.mkdir()
    shutil.copy(weights, sharded / "model-1.safetensors")
    with_index = sharded / "model.safetensors.index.json"
    names_of = list(TensorFile([weights]))
    write_json(
        with_index, {"metadata": {}, "weight_map": {n: "model-1.safetensors" for n in names_of}}
    )
    yield Target(
        name="index of shards", file=with_index, kind="json",
        read=lambda _: open_component(sharded, "model"),
    )  # fmt: skip
    single = folder / "single" / "x.safetensors"
    single.parent.mkdir()
    write_single_file(single, whole.params, "sdxl", "fp16")
    shutil.copytree(model, single.parent / "config", ignore=shutil.ignore_patterns("*.safetensors"))

    def read_single(_: Any) -> None:
        file = LdmFile.open(single)
        if file is None:
            raise ValueError("no such file")
        for name, tree in whole.params.items():
            found = file.component(name, tree)
            views = names.match_tensors(found, tree, name)
            if name == "text_encoder":
                to_host(views, tree, found.release)
        file.check_all_used()

    yield Target(name="single file", file=single, kind="safetensors", read=read_single, weight=0.2)


def _traced(file: Path, network: Any) -> None:
    """As the family traces it."""
    try:
        abstract_params(network)
    except Exception as error:  # as `from_configs`: whatever a shape that does not fit raises
        raise ValueError(f"{file} describes no network ({type(error).__name__})") from None


def tokenizers(folder: Path) -> Iterator[Target]:
    """A CLIP tokenizer's files."""
    source = folder / "model" / "tokenizer_2"
    for name, kind in (
        ("vocab.json", "json"), ("merges.txt", "lines"), ("tokenizer_config.json", "json"),
        ("special_tokens_map.json", "json"),
    ):  # fmt: skip
        copy = folder / f"tokenizer-{name}"
        shutil.copytree(source, copy)

        def read(_: Any, copy: Path = copy) -> None:
            (ids,) = tokenize([read_tokenizer(copy, 522)], ["a red cat", "", *TEXTS[:2]])
            if ids.min() < 0 or ids.max() >= 522 or ids.shape[1] > 77:
                raise AssertionError("ids that the text encoder does not know")

        yield Target(name=f"tokenizer {name}", file=copy / name, kind=kind, read=read, weight=2)


def loras(folder: Path) -> Iterator[Target]:
    """LoRAs of three dialects, and what headers and configs say of them."""
    shapes = abstract_model(folder / "model").params
    few = ("to_q", "to_out.0", "conv1")
    tree = jax.eval_shape(lambda key: lora.init(shapes["unet"], few, 2, key), jax.random.key(0))
    adapter = random_adapter(tree, np.random.default_rng(0))
    networks = {name: shapes[name] for name in ("unet", "text_encoder", "text_encoder_2")}

    def reader(path: Path) -> Callable[[Any], Any]:
        return lambda _: read_networks(path, networks, LORA_NAMES)

    for dialect in ("diffusers", "kohya"):
        path = folder / f"lora-{dialect}" / "x.safetensors"
        path.parent.mkdir()
        write_lora(path, adapter, LORA_NAMES, dialect=dialect, metadata={
            "lora_adapter_metadata": json.dumps({"unet.lora_alpha": 4, "unet.r": 2})
        } if dialect == "diffusers" else {"ss_network_alpha": "2"})  # fmt: skip
        yield Target(
            name=f"LoRA {dialect}", file=path, kind="safetensors", read=reader(path), weight=4
        )
    header = folder / "lora-header" / "header.json"
    header.parent.mkdir()
    write_json(header, {"unet.lora_alpha": 4, "unet.r": 2, "unet.alpha_pattern": {"to_q": 3}})

    def read_header(_: Any) -> None:
        path = header.parent / "x.safetensors"
        text = header.read_bytes().decode("utf-8", "replace")
        write_lora(path, adapter, LORA_NAMES, metadata={"lora_adapter_metadata": text})
        read_networks(path, networks, LORA_NAMES)

    yield Target(name="LoRA's header", file=header, kind="json", read=read_header, weight=2)
    peft = folder / "lora-peft"
    peft.mkdir()
    stored = names.to_torch({})
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapter):
        *layer, part = (key.key for key in path)
        value = names.to_torch_layout(("kernel",), np.asarray(leaf))
        stored[f"base_model.model.{'.'.join(layer)}.{part}.weight"] = np.ascontiguousarray(value)
    save_tensors(peft / PEFT_FILE, stored)
    write_json(peft / PEFT_CONFIG, {"peft_type": "LORA", "lora_alpha": 8, "r": 2})
    yield Target(
        name="PEFT config", file=peft / PEFT_CONFIG, kind="json", read=reader(peft), weight=2
    )
