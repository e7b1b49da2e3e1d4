"""A recipe, typed: the frozen dataclasses that a config is read into, checked before any work.

A config is an ml_collections tree of plain values (see `configs/`). Reading it refuses unknown
keys, missing keys and values of the wrong type, naming the dotted key.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from tlcm_jax.diffusion.sampling import check_gamma
from tlcm_jax.distillation.checks import check_at_least
from tlcm_jax.distillation.registry import OBJECTIVES, TERMS
from tlcm_jax.io.image_size import ImageSize
from tlcm_jax.models.lora import LoRAConfig
from tlcm_jax.training.retention import Keep


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlSettings:
    """A frozen control network, through which student and teacher are asked alike.

    Attributes:
      path: a ControlNet's or a T2I-Adapter's folder, file or hub id.
      images: folder with a map for each training prompt (`config.controls`).
      scale: what its residuals are multiplied by.
    """

    path: str
    images: str
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 2:
            raise ValueError(f"scale = {self.scale:g}: must lie above 0, to 2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The teacher.

    Attributes:
      path: a diffusers pipeline folder, a single-file checkpoint or a hub id.
      dtype: compute dtype of the networks.
      param_dtype: dtype that the frozen weights are kept in.
      resolution: of the images: `WIDTHxHEIGHT` in pixels, such as `1216x832`, or the side of a
        square; 0 takes the model's own.
      buckets: the sizes that are trained on, as `resolution` has them, with their weights; each
        refill's is drawn by weight (`data.buckets`). None trains on `resolution` alone, which in
        both cases is what is generated.
      remat: the UNet's rematerialisation policy: `none`; `attention`, the transformer blocks but
        for attention's results; `blocks`, these too; `all`, the resnets too, for the least memory.
      vae: another autoencoder than the model's, or that of a file without one: a folder, a file or
        a hub id.
      loras: your own, merged into the teacher before it is distilled: each a file, a folder or a
        hub id, `PATH` or `PATH:WEIGHT`.
      controls: control networks to distil through, by any name; previews and the final evaluation
        draw without them.
    """

    path: str
    dtype: str = "float32"
    param_dtype: str = "float32"
    resolution: int | str = 0
    buckets: Mapping[str, float] = dataclasses.field(default_factory=dict)
    remat: str = "none"
    vae: str = ""
    loras: tuple[str, ...] = ()
    controls: Mapping[str, ControlSettings] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("dtype", "param_dtype"):
            _one_of(f"model.{name}", getattr(self, name), ("float32", "bfloat16"))
        _one_of("model.remat", self.remat, ("none", "attention", "blocks", "all"))
        try:
            ImageSize.read(self.resolution)
        except ValueError as error:
            raise ValueError(f"model.{error}") from None
        try:
            sizes = [size for size, _ in self.size_buckets]
        except ValueError as error:
            raise ValueError(f"model.buckets: {error}") from None
        if len(set(sizes)) < len(sizes):
            raise ValueError(f"model.buckets: {', '.join(self.buckets)}: a size stands there twice")
        for name, weight in self.buckets.items():
            if not 0 < weight < math.inf:
                raise ValueError(f"model.buckets[{name!r}] = {weight}: must be above 0")

    @property
    def size(self) -> ImageSize | None:
        """The `resolution`; None for the model's own."""
        return ImageSize.read(self.resolution)

    @property
    def size_buckets(self) -> tuple[tuple[ImageSize, float], ...]:
        """The `buckets`, sizes and weights."""
        found = []
        for name, weight in self.buckets.items():
            if (size := ImageSize.read(name)) is None:
                raise ValueError(f"resolution {name}: must be at least 1")
            found.append((size, weight))
        return tuple(found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageSettings:
    """One stage of the recipe: a consistency objective, and terms beside its loss.

    Attributes:
      objective: a name in `distillation.registry.OBJECTIVES`.
      steps: optimiser updates of the student.
      batch_size: pairs of an update, over all devices and micro-batches.
      prompts_per_refill: prompts whose pairs are made at once, shuffled, and then gone through in
        updates of `batch_size`; 0 is as many as `batch_size`. The more, the better mixed, and the
        more memory.
      accumulate: micro-batches an update.
      epochs: how often the pairs of a refill are gone through: the teacher's work is done once,
        whatever the number.
      unconditional: share of the prompts that pairs are made without, for a student that is to be
        guided as its teacher is (with `guidance_scale` 1 in `settings`).
      paths: folder of pairs that `tlcm_jax.teacher_paths` drew, gone through again and again in
        place of asking the teacher; "" draws them.
      learning_rate: peak.
      warmup_steps: updates of linear warm-up.
      decay: `constant`, `cosine` or `linear`, over the whole stage.
      final_fraction: what the decay leaves of the learning rate.
      max_grad_norm: of the gradient clip.
      adam_eps: what Adam adds to the root of the second moment. Latents much below unit variance
        make gradients that the default swallows.
      ema_decay: of an EMA of the student over the stage's updates, which then is what samples,
        scores and exports see; 0 keeps none. The next stage trains the student itself.
      settings: the objective's own settings dataclass.
      terms: settings dataclasses of what joins the loss, by a name in
        `distillation.registry.TERMS`; each has a `weight`, and none of weight 0 costs anything.
    """

    objective: str
    steps: int
    batch_size: int
    prompts_per_refill: int = 0
    accumulate: int = 1
    epochs: int = 1
    unconditional: float = 0.0
    paths: str = ""
    learning_rate: float
    warmup_steps: int = 0
    decay: str = "constant"
    final_fraction: float = 0.0
    max_grad_norm: float = 1.0
    adam_eps: float = 1e-8
    ema_decay: float = 0.0
    settings: Any = None
    terms: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "epochs"):
            check_at_least(name, getattr(self, name), 1)
        for name in ("prompts_per_refill", "learning_rate", "warmup_steps", "final_fraction"):
            check_at_least(name, getattr(self, name), 0)
        if not self.adam_eps > 0:
            raise ValueError(f"adam_eps = {self.adam_eps}: must be positive, such as 1e-8")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay = {self.ema_decay}: must lie in 0 (none) to below 1")
        if not 0 <= self.unconditional < 1:
            raise ValueError(f"unconditional = {self.unconditional}: must lie in 0 to below 1")
        if self.unconditional and (readers := {"preference", "reward"} & set(self.terms)):
            raise ValueError(
                f"unconditional = {self.unconditional}: {' and '.join(sorted(readers))} would "
                "score pairs by prompts that they were made without"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate = {self.accumulate}: must divide batch_size = {self.batch_size}"
            )

    @property
    def refill(self) -> int:
        """The `prompts_per_refill` that holds."""
        return self.prompts_per_refill or self.batch_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What is drawn and scored at the end of a run.

    Attributes:
      prompts: prompt files, the headline's first; a JSON file of the same name beside one says
        what each prompt asks for, for the scorers that need it. None of them leaves the evaluation
        to the `evaluate` command, as `evaluation = None` does.
      scorers: each as NAME or NAME=PATH (`evaluation.scorers.table`); none draws without scoring.
      steps: the student's step counts.
      guidance_scale: of the undistilled teacher.
      gamma: share of fresh noise between the student's steps (`diffusion.sampler`).
      student_guidance_scales: of a student that was distilled without guidance, the recommended
        one first; each is a row. 1 draws without.
      undistilled: step counts of the teacher by the student's sampler: what was there before.
      pictures: prompts shown in the report.
      limit: prompts used of each file; 0 takes all.
    """

    prompts: tuple[str, ...]
    scorers: tuple[str, ...] = ()
    steps: tuple[int, ...] = (1, 2, 3, 4, 8)
    guidance_scale: float = 8.0
    gamma: float = 1.0
    student_guidance_scales: tuple[float, ...] = (1.0,)
    undistilled: tuple[int, ...] = ()
    pictures: int = 12
    limit: int = 0

    def __post_init__(self) -> None:
        check_gamma(self.gamma)
        if not self.student_guidance_scales or min(self.student_guidance_scales) < 0:
            raise ValueError(
                f"student_guidance_scales = {self.student_guidance_scales}: give at least one, "
                "none below 0"
            )
        for name in ("guidance_scale", "pictures", "limit"):
            check_at_least(name, getattr(self, name), 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A whole recipe.

    Attributes:
      name: shown in the report and the model card.
      seed: of everything random.
      prompts: files of training prompts.
      text_cache: folder, on disk or `gs://`, of the prompts' embeddings: made where it lacks them,
        after which the text encoders leave the devices; "" encodes prompts as they come.
      latents: file of real latents and their captions (`data/latents.py`), for the stages whose
        states are made of them; these see its captions in place of the prompts.
      adapter: the LoRA that all stages train.
      trainable: what all stages train: `adapter`, or `full`, the network's own weights, which are
        kept in float32 beside the teacher's. Auxiliary networks are adapters in both cases.
      stages: the stages by name, in order.
      mesh: sizes of the axes `data` and `fsdp`; -1 takes the rest.
      log_every: steps between rows of metrics.
      sample_every: steps between previews, drawn into the workdir's `samples`; 0 draws none.
      checkpoint_every: steps between checkpoints.
      keep_checkpoints: how many are kept, the newest.
      keep_every: those of every so many steps over all stages are kept too; 0 keeps none so.
      keep_stage_ends: whether each stage's last one is kept too.
      keep_best: a metric of the rows whose least value is kept too, or, as "-METRIC", whose
        greatest; "" keeps none so.
      max_skipped_updates: so many updates in a row that are not finite, and are skipped, end the
        run.
      evaluation: None leaves it to the `evaluate` command.
      export: products written at the end.
    """

    name: str
    seed: int = 0
    model: ModelSettings
    prompts: tuple[str, ...]
    text_cache: str = ""
    latents: str = ""
    adapter: LoRAConfig = LoRAConfig()
    trainable: str = "adapter"
    stages: Mapping[str, StageSettings]
    mesh: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"data": -1, "fsdp": 1})
    log_every: int = 10
    sample_every: int = 0
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    keep_every: int = 0
    keep_stage_ends: bool = False
    keep_best: str = ""
    max_skipped_updates: int = 10
    evaluation: EvaluationSettings | None = None
    export: tuple[str, ...] = ("kohya",)

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages: the recipe has none; give at least one")
        _one_of("trainable", self.trainable, ("adapter", "full"))
        for name in ("log_every", "checkpoint_every", "keep_checkpoints", "max_skipped_updates"):
            check_at_least(name, getattr(self, name), 1)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed = {self.seed}: must lie in 0 to {2**32 - 1}")
        for name in ("sample_every", "keep_every"):
            check_at_least(name, getattr(self, name), 0)
        if self.text_cache and self.model.buckets:
            raise ValueError("text_cache: model.buckets tell the sizes with the prompts; leave one")
        if self.model.controls:
            paths = any(stage.paths for stage in self.stages.values())
            without = {"latents": self.latents, "model.buckets": self.model.buckets,
                       "stages.*.paths": paths}  # fmt: skip
            for name, given in without.items():
                if given:
                    raise ValueError(
                        f"model.controls: maps belong to the prompts, at one size, and {name} has "
                        "none; leave one out"
                    )
        if self.trainable == "full" and {"lora", "kohya"} & set(self.export):
            raise ValueError(
                f"export = {self.export}: a UNet trained whole has no LoRA; export 'pipeline'"
            )

    @property
    def keep(self) -> Keep:
        """Which checkpoints are kept."""
        return Keep(
            last=self.keep_checkpoints,
            every=self.keep_every,
            stage_ends=self.keep_stage_ends,
            best=self.keep_best,
        )


# Keys that may differ when a workdir is resumed: they change what is shown, not what is learnt.
MAY_CHANGE = (
    "log_every",
    "sample_every",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every",
    "keep_stage_ends",
    "keep_best",
    "max_skipped_updates",
    "evaluation",
    "export",
    "mesh",
    "text_cache",
)

# Keys and names of older recipes, and what they are called now.
RENAMED = {
    "updates": "`steps` (which counts optimiser updates), with `batch_size` their pairs and "
    "`prompts_per_refill` the prompts that are drawn at once",
    "warmup_updates": "`warmup_steps`",
    "nodes_per_segment": "`points_per_segment`",
    "landing": '`target_time` ("milestone" or "uniform")',
    "share": "`max_grad_ratio`",
    "scorer": "`scorers`, a mapping by name, such as {'mps': {'weights': 'scorers/mps'}}",
    "threshold": "each scorer's own, in `scorers`",
    "judge": "`held_out`",
    "judge_weights": "`held_out_weights`",
    "stop_when_parted": "`stop_on_reward_hacking`",
    "critic_updates": "`aux_updates`",
    "critic_learning_rate": "`aux_learning_rate`",
    "segment_consistency": '"mlcd"',
    "endpoint_consistency": '"lcd"',
    "trajectory_regression": '"trajectory_kd"',
}


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
    kind = _named(OBJECTIVES, raw.get("objective"), f"{where}.objective")
    raw["settings"] = _build(kind, raw.get("settings") or {}, f"{where}.settings")
    terms = raw.get("terms") or {}
    if not isinstance(terms, Mapping):
        raise ValueError(f"config key {where + '.terms'!r} must be a mapping, got {terms!r}")
    built = {
        term: _build(_named(TERMS, term, f"{where}.terms"), chosen, f"{where}.terms.{term}")
        for term, chosen in terms.items()
    }
    # One of weight 0 is as one that is not there: it costs nothing, and needs no weights on disk.
    raw["terms"] = {term: chosen for term, chosen in built.items() if chosen.weight > 0}
    return _build(StageSettings, raw, where)


def _named(table: Mapping[str, type], name: Any, where: str) -> type:
    """What a table holds under a name that a recipe gives."""
    if not isinstance(name, str):
        raise ValueError(f"config key {where!r} must be a name, got {name!r}")
    if name not in table:
        now = RENAMED.get(name)
        hint = f"it is {now} now" if now else f"known: {', '.join(table)}"
        raise ValueError(f"config key {where!r}: unknown {name!r}; {hint}")
    return table[name]


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
            if key in RENAMED:
                hint = f"; it is {RENAMED[key]} now"
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
        if value is None and type(None) in arguments:
            return None
        if any(isinstance(a, type) and type(value) is a for a in arguments):
            return value
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
