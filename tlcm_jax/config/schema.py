"""A recipe, typed: the frozen dataclasses that a config is read into, checked before any work.

A config is an ml_collections tree of plain values (see `configs/`). Reading it refuses unknown
keys, missing keys and values of the wrong type, naming the dotted key.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from tlcm_jax.diffusion.sampling import check_gamma
from tlcm_jax.distillation import registry as stages
from tlcm_jax.distillation.checks import check_at_least
from tlcm_jax.models import lora


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The teacher.

    Attributes:
      path: a diffusers pipeline folder, a single-file checkpoint or a hub id.
      dtype: compute dtype of the networks.
      param_dtype: dtype that the frozen weights are kept in.
      resolution: side of the pictures in pixels; 0 takes the model's own.
      remat: the UNet's rematerialisation policy, `none` or `blocks`.
    """

    path: str
    dtype: str = "float32"
    param_dtype: str = "float32"
    resolution: int = 0
    remat: str = "none"

    def __post_init__(self) -> None:
        for name in ("dtype", "param_dtype"):
            _one_of(f"model.{name}", getattr(self, name), ("float32", "bfloat16"))
        _one_of("model.remat", self.remat, ("none", "blocks"))
        check_at_least("model.resolution", self.resolution, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """The LoRA that all stages train.

    Attributes:
      rank: r.
      alpha: the update is scaled by alpha / rank.
      targets: names of the adapted layers.
      merged: add the adapter to the weights before each call instead of running its factors
        beside them. The same function; cheaper where the rank is not small against the layers'
        width, at the price of gradients as large as the base.
    """

    rank: int = 64
    alpha: float = 8.0
    targets: tuple[str, ...] = lora.TARGETS
    merged: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(
                f"adapter.rank = {self.rank}, adapter.alpha = {self.alpha}: must be positive"
            )
        if not self.targets:
            raise ValueError("adapter.targets is empty: nothing would be trained; name layers")

    @property
    def scale(self) -> float:
        """The factor alpha / rank of the update."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageSettings:
    """One stage of the recipe: a consistency objective, and terms beside its loss.

    Attributes:
      objective: a name in `distillation.stages.STAGES`.
      steps: training steps.
      batch_size: prompts a step, over all devices.
      updates: optimiser updates a step, each on its share of the step's examples.
      accumulate: micro-batches an update.
      epochs: how often a step goes through its examples, with `updates` each time: the teacher's
        work is done once, whatever the number.
      learning_rate: peak.
      warmup_updates: updates of linear warm-up.
      decay: `constant`, `cosine` or `linear`, over the whole stage.
      final_fraction: what the decay leaves of the learning rate.
      max_grad_norm: of the gradient clip.
      ema_decay: of an average of the student over the stage's updates, which then is what
        samples, scores and exports see; 0 keeps none. The next stage trains the student itself.
      settings: the objective's own settings dataclass.
      terms: settings dataclasses of what joins the loss, by a name in
        `distillation.stages.TERMS`; each has a `weight`, and none of weight 0 costs anything.
    """

    objective: str
    steps: int
    batch_size: int
    updates: int = 1
    accumulate: int = 1
    epochs: int = 1
    learning_rate: float
    warmup_updates: int = 0
    decay: str = "constant"
    final_fraction: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0
    settings: Any = None
    terms: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            check_at_least(name, getattr(self, name), 1)
        for name in ("learning_rate", "warmup_updates", "final_fraction"):
            check_at_least(name, getattr(self, name), 0)

    @property
    def needs_latents(self) -> bool:
        """Whether its states are made of real latents."""
        return stages.find(self.objective).needs_latents(self.settings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What is drawn and scored at the end of a run.

    Attributes:
      prompts: prompt files, the headline's first; a JSON file of the same name beside one says
        what each prompt asks for, for the scorers that need it.
      scorers: each as NAME or NAME=PATH (`evaluation.scorers.table`); none draws without scoring.
      steps: the student's step counts.
      guidance_scale: of the undistilled teacher.
      gamma: share of fresh noise between the student's steps (`diffusion.sampler`).
      pictures: prompts shown in the report.
      limit: prompts used of each file; 0 takes all.
    """

    prompts: tuple[str, ...]
    scorers: tuple[str, ...] = ()
    steps: tuple[int, ...] = (1, 2, 3, 4, 8)
    guidance_scale: float = 8.0
    gamma: float = 1.0
    pictures: int = 12
    limit: int = 0

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("prompts is empty: name a file of them, or set `evaluation` to None")
        check_gamma(self.gamma)
        for name in ("guidance_scale", "pictures", "limit"):
            check_at_least(name, getattr(self, name), 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A whole recipe.

    Attributes:
      name: shown in the report and the model card.
      seed: of everything random.
      prompts: files of training prompts.
      latents: file of real latents and their captions (`data/latents.py`), for the stages whose
        states are made of them; these see its captions in place of the prompts.
      trainable: what all stages train: `adapter`, or `full`, the UNet's own weights, which are
        kept in float32 beside the teacher's. Critics are adapters in both cases.
      stages: the stages by name, in order.
      mesh: sizes of the axes `data` and `fsdp`; -1 takes the rest.
      log_every: steps between rows of metrics.
      checkpoint_every: steps between checkpoints.
      keep_checkpoints: how many are kept.
      evaluation: None leaves it to the `evaluate` command.
      export: products written at the end.
    """

    name: str
    seed: int = 0
    model: ModelSettings
    prompts: tuple[str, ...]
    latents: str = ""
    adapter: AdapterSettings = AdapterSettings()
    trainable: str = "adapter"
    stages: Mapping[str, StageSettings]
    mesh: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"data": -1, "fsdp": 1})
    log_every: int = 10
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    evaluation: EvaluationSettings | None = None
    export: tuple[str, ...] = ("lora",)

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages: the recipe has none; give at least one")
        _one_of("trainable", self.trainable, ("adapter", "full"))
        for name in ("log_every", "checkpoint_every", "keep_checkpoints"):
            check_at_least(name, getattr(self, name), 1)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed = {self.seed}: must lie in 0 to {2**32 - 1}")
        for name, stage in self.stages.items():
            if stage.needs_latents and not self.latents:
                raise ValueError(
                    f"stages.{name} makes its states of real latents: set `latents` to a file of "
                    "them, such as `python -m miniature.encode_latents` writes"
                )
        if self.trainable == "full" and {"lora", "kohya"} & set(self.export):
            raise ValueError(
                f"export = {self.export}: a UNet trained whole has no LoRA; export 'pipeline'"
            )


# Keys that may differ when a workdir is resumed: they change what is shown, not what is learnt.
MAY_CHANGE = ("log_every", "checkpoint_every", "keep_checkpoints", "evaluation", "export", "mesh")


def read(config: Mapping[str, Any]) -> Settings:
    """Reads a config, given as nested mappings of plain values.

    Raises:
      ValueError: an unknown, missing or ill-typed key, or a value out of range; it is named.
    """
    raw = dict(config)
    if not isinstance(raw.get("stages"), Mapping):
        raise ValueError("config key 'stages' must be a mapping of stages by name")
    order = raw.pop("stage_order", None) or list(raw["stages"])
    if sorted(order) != sorted(raw["stages"]):
        raise ValueError(
            f"stage_order {list(order)} must name each of stages {sorted(raw['stages'])} once"
        )
    raw["stages"] = {name: _read_stage(name, raw["stages"][name]) for name in order}
    return _build(Settings, raw, "")


def _read_stage(name: str, raw: Mapping[str, Any]) -> StageSettings:
    where = f"stages.{name}"
    if not isinstance(raw, Mapping):
        raise ValueError(f"config key {where!r} must be a mapping, got {raw!r}")
    raw = dict(raw)
    kind = _named(stages.find, raw.get("objective"), f"{where}.objective").settings
    raw["settings"] = _build(kind, raw.get("settings") or {}, f"{where}.settings")
    terms = raw.get("terms") or {}
    if not isinstance(terms, Mapping):
        raise ValueError(f"config key {where + '.terms'!r} must be a mapping, got {terms!r}")
    built = {
        term: _build(
            _named(stages.find_term, term, f"{where}.terms").settings,
            chosen,
            f"{where}.terms.{term}",
        )
        for term, chosen in terms.items()
    }
    # One of weight 0 is as one that is not there: it costs nothing, and needs no weights on disk.
    raw["terms"] = {term: chosen for term, chosen in built.items() if chosen.weight > 0}
    return _build(StageSettings, raw, where)


def _named(find: Callable[[str], Any], name: Any, where: str) -> Any:
    """What a table holds under a name that a recipe gives."""
    if not isinstance(name, str):
        raise ValueError(f"config key {where!r} must be a name, got {name!r}")
    try:
        return find(name)
    except ValueError as error:
        raise ValueError(f"config key {where!r}: {error}") from None


def _build(kind: type, raw: Any, where: str) -> Any:
    """An instance of the dataclass `kind` from a mapping."""
    if not isinstance(raw, Mapping):
        raise ValueError(f"config key {where!r} must be a mapping, got {raw!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    prefix = where + "." if where else ""
    for key in raw:
        if key not in fields:
            close = difflib.get_close_matches(key, fields, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(fields)}"
            raise ValueError(f"unknown config key {prefix + key!r}{hint}")
    hints = typing.get_type_hints(kind)
    values = {}
    for name, field in fields.items():
        if name in raw:
            values[name] = _convert(hints[name], raw[name], prefix + name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"config key {prefix + name!r} is missing")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    """A plain value as the type that a field wants."""
    if hint is Any:
        return value
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else _build(hint, value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"config key {where!r} must be a list, got {value!r}")
        return tuple(_convert(arguments[0], item, where) for item in value)
    if origin is not None:  # a Mapping
        if not isinstance(value, Mapping):
            raise ValueError(f"config key {where!r} must be a mapping, got {value!r}")
        return {k: _convert(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"config key {where!r} must be {hint.__name__}, got {value!r}")
    return value


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} = {value!r}: must be one of {', '.join(choices)}")
