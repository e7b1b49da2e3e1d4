"""Another language for SDXL: Chinese-CLIP's text tower and an adapter in its encoders' place.

A folder holds Chinese-CLIP as its hub has it (`config.json`, `model.safetensors`, of which the text
tower is read, and `vocab.txt`), and beside it `text_adapter.safetensors`: PEA-Diffusion's
`layernorm`, `projector` and `fc`.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray
from transformers import BertTokenizer

from tlcm_jax.data.tokens import read_bert_tokenizer
from tlcm_jax.families.base import abstract_params
from tlcm_jax.families.product import Params
from tlcm_jax.io import names
from tlcm_jax.io.json_files import parse, read_object
from tlcm_jax.io.placement import to_devices
from tlcm_jax.io.places import Place, PlacedTensors
from tlcm_jax.io.tensors import TensorFile, Tensors, refuse_pickle
from tlcm_jax.models.chinese_clip import ChineseCLIPTextConfig, ChineseCLIPTextModel
from tlcm_jax.models.conditioning import Conditioning
from tlcm_jax.models.text_adapter import TextAdapter, TextAdapterConfig

TOWER, ADAPTER = "adapter_text_encoder", "text_adapter"
ADAPTER_FILE = "text_adapter.safetensors"
# What Chinese-CLIP reads of a text, begin and end included.
LENGTH = 52


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptedTexts:
    """The two networks, without weights.

    Attributes:
      tower: text to states.
      adapter: states to SDXL's conditioning.
      length: of a text, in tokens.
    """

    tower: ChineseCLIPTextModel
    adapter: TextAdapter
    length: int = LENGTH

    def encode(
        self, params: Params, ids: ArrayLike
    ) -> tuple[Float[Array, "b n s"], Float[Array, "b p"]]:
        """The sequence and the pooled output of token ids `[b, n]`; traceable."""
        states: Any = self.tower.apply({"params": params[TOWER]}, jnp.asarray(ids))
        return self.adapter.apply({"params": params[ADAPTER]}, states)

    def conditioning(
        self, adapter: Params, frozen: Params, ids: ArrayLike, like: Conditioning
    ) -> Conditioning:
        """That of token ids by an adapter's weights; what is no text is of `like`."""
        sequence, pooled = self.encode({TOWER: frozen[TOWER], ADAPTER: adapter}, ids)
        return dataclasses.replace(like, prompt_embeds=sequence, pooled=pooled)


def read_text_adapter(
    path: str | Path,
    *,
    dtype: Any,
    pooled_width: int,
    sequence_width: int,
    key: PRNGKeyArray | None = None,
    hidden_width: int = 2048,
) -> tuple[AdaptedTexts, dict[str, Any], BertTokenizer]:
    """Reads a folder.

    Args:
      path: of the form above.
      key: of a fresh adapter, fp32, in the place of the folder's.
      hidden_width: of that one.
      dtype: of weights and computations.
      pooled_width: what the UNet takes.
      sequence_width: what the UNet takes.

    Returns:
      The networks, their weights by `TOWER` and `ADAPTER`, and the tokenizer.

    Raises:
      FileNotFoundError: a part of it is missing, which is named.
      ValueError: the parts do not fit each other or the UNet.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"--adapter {path}: there is no such folder; give one with Chinese-CLIP's config.json, "
            f"model.safetensors and vocab.txt, and {ADAPTER_FILE}"
        )
    needed_files = ["config.json", "model.safetensors", "vocab.txt"]
    for name in (*needed_files, *([ADAPTER_FILE] if key is None else [])):
        if not (folder / name).is_file():
            for other in folder.glob("*"):
                refuse_pickle(other)
            raise FileNotFoundError(f"--adapter {path} holds no {name}")
    file = folder / "config.json"
    config = parse(file, read_object(file), ChineseCLIPTextConfig.from_dict)
    tower = ChineseCLIPTextModel(config, dtype)
    if key is None:
        weights = TensorFile([folder / ADAPTER_FILE])
        found = _adapter_config(folder / ADAPTER_FILE, weights)
        adapter = TextAdapter(found, dtype)
        read = _load(weights, abstract_params(adapter, dtype), folder / ADAPTER_FILE)
    else:
        found = TextAdapterConfig(
            in_width=config.hidden_size,
            hidden_width=hidden_width,
            pooled_width=pooled_width,
            sequence_width=sequence_width,
        )
        adapter = TextAdapter(found, dtype)
        read = adapter.init(key, *adapter.example())["params"]
    for what, needed, given in (
        ("reads states", config.hidden_size, found.in_width),
        ("gives a pooled output", pooled_width, found.pooled_width),
        ("gives a sequence", sequence_width, found.sequence_width),
    ):
        if needed != given:
            whose = "its text encoder" if what == "reads states" else "the model"
            raise ValueError(
                f"--adapter {path}: {ADAPTER_FILE} {what} {given} wide, but {whose} has {needed}: "
                "it was trained for another"
            )
    prefix = "text_model."
    file = folder / "model.safetensors"
    whole = TensorFile([file])
    shapes = abstract_params(tower, dtype)
    places = {name: Place(prefix + name) for name in names.to_torch_names(shapes)}
    params = {
        TOWER: _load(PlacedTensors(whole, places), shapes, file),
        ADAPTER: read,
    }
    tokenizer = read_bert_tokenizer(folder / "vocab.txt", config.vocab_size)
    length = min(LENGTH, config.max_position_embeddings)
    return AdaptedTexts(tower=tower, adapter=adapter, length=length), params, tokenizer


def _load(tensors: Tensors, shapes: Any, file: Path) -> Any:
    views = names.match_tensors(tensors, shapes, str(file))
    try:
        return to_devices(views, shapes, tensors.release, None)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _adapter_config(file: Path, weights: TensorFile) -> TextAdapterConfig:
    try:
        (hidden, width), (pooled, _), (sequence, _) = (
            weights[f"{name}.weight"].shape for name in ("projector.0", "projector.4", "fc")
        )
    except (KeyError, ValueError):
        raise ValueError(
            f"{file} is no text adapter: it has no projector.0, projector.4 and fc"
        ) from None
    return TextAdapterConfig(
        in_width=width, hidden_width=hidden, pooled_width=pooled, sequence_width=sequence
    )
