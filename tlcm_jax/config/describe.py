"""What a recipe says of its student: method, data, sampling times, settings; for cards and reports.

Everything here is read off the typed settings, never off a recipe's or a file's name. A method is
named by what defines it:

    LCM       one segment: every point of a path jumps to its end
    TLCM      states on the teacher's own paths; milestones; consistency between segments
    MCM       noised real latents, several segments
    PCM       an adversarial term inside the segment
    Hyper-SD  targets at any time of a segment
    SCott     noised real latents, a stochastic teacher
    DMD2      distribution matching without a consistency loss
    TDM       the same, along the student's own deterministic trajectory
    decoupled DMD  the same, with times of its own for the guidance
    RLCM      a policy gradient on the steps of the student's own sampler

and a recipe that takes something from several of them says what from which.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tlcm_jax.config.schema import Settings, StageSettings
from tlcm_jax.data.prompts import read_prompts
from tlcm_jax.diffusion.timesteps import milestone_indices, student_timesteps
from tlcm_jax.families.base import LatentModel
from tlcm_jax.io.lora_stack import split_weight
from tlcm_jax.io.model_card import Recipe, teacher_licence, teacher_name
from tlcm_jax.io.npz_files import read_npz

# Method -> its paper on arXiv.
PAPERS = {
    "TLCM": "2406.05768",
    "LCM": "2310.04378",
    "MCM": "2403.06807",
    "PCM": "2405.18407",
    "Hyper-SD": "2404.13686",
    "SCott": "2403.01505",
    "DMD2": "2405.14867",
    "TDM": "2503.06674",
    "decoupled DMD": "2511.22677",
    "RLCM": "2404.03673",
    "trajectory distillation": "2101.02388",
}


def student_recipe(settings: Settings, model: LatentModel) -> Recipe:
    """What the cards of a student say of it.

    Args:
      settings: the recipe that was run.
      model: its teacher.
    """
    whole, adapter = settings.trainable == "full", settings.adapter
    trained = f"a LoRA of rank {adapter.rank}, alpha {adapter.alpha:g}, on {len(adapter.targets)} "
    return Recipe(
        name=settings.name,
        teacher=teacher_name(model.source),
        loras=lora_names(settings),
        method=method_name(settings),
        times=sampling_times(settings),
        gamma=gamma(settings),
        guidance_scales=guidance_scales(settings),
        guidance_scale=student_guidance_scale(settings) if keeps_guidance(settings) else 0.0,
        ingredients=tuple(
            f"{method} (arXiv {PAPERS[method]}): {', '.join(what)}"
            for method, what in methods(settings).items()
        ),
        data=data(settings),
        size=settings.model.size,
        images=images(settings),
        trained=f"all weights of the {model.backbone}" if whole else trained + "kinds of layers",
        rank=0 if whole else adapter.rank,
        stages=stage_lines(settings),
        licence=teacher_licence(Path(model.folder)),
    )


def lora_names(settings: Settings) -> tuple[str, ...]:
    """The LoRAs that were merged into the teacher, by name and weight; no path of a machine."""
    split = map(split_weight, settings.model.loras)
    return tuple(f"{teacher_name(path)}, weight {weight:g}" for path, weight in split)


def methods(settings: Settings) -> dict[str, list[str]]:
    """What a recipe takes from which method (a key of `PAPERS`), in the order of its stages."""
    found: dict[str, list[str]] = {}
    for stage in settings.stages.values():
        for method, what in _ingredients(stage):
            if what not in found.setdefault(method, []):
                found[method].append(what)
    return found


def _ingredients(stage: StageSettings) -> Iterator[tuple[str, str]]:
    chosen, terms, of_data = stage.settings, stage.terms, reads_latents(stage)
    matched_alone = False
    if stage.objective == "mlcd":
        several = chosen.segments > 1
        adversarial = terms.get("adversarial")
        inside = adversarial is not None and adversarial.real == "target"
        if not of_data:
            yield "TLCM", "states on the teacher's own paths from noise"
        if chosen.solver == "sde":
            yield "SCott", "a teacher that steps stochastically"
        if chosen.target_time == "uniform":
            yield "Hyper-SD", "targets at any time of a segment"
        elif not several and chosen.solver != "sde":
            yield "LCM", "one segment, whose end every state jumps to"
        elif several and not inside:
            yield "MCM" if of_data else "TLCM", "jumps to the segment's milestone"
        if chosen.solver == "addim":
            yield "MCM", "a teacher that steps by adjusted DDIM"
        if inside:
            yield "PCM", "an adversarial term inside the segment"
        elif adversarial is not None and of_data:
            yield "SCott", "an adversarial term against the real latents"
        elif adversarial is not None:
            yield "TLCM", "an adversarial term"
    elif stage.objective == "lcd":
        matching, adversarial = terms.get("distribution_matching"), terms.get("adversarial")
        matched_alone = chosen.weight == 0 and matching is not None
        if matched_alone:
            yield _matching(matching)
        elif chosen.weight > 0:
            yield "TLCM", "consistency between milestones, on the student's own rollouts"
        if adversarial is not None and adversarial.real == "target":
            yield "TLCM", "an adversarial term between prediction and target"
        elif adversarial is not None:
            yield "TLCM", "an adversarial term against the student's own samples"
    else:
        yield "trajectory distillation", "regression on the ends of the teacher's paths"
        if chosen.own_states:
            yield "TLCM", "states of the student's own rollouts"
        if "adversarial" in terms:
            yield "TLCM", "an adversarial term"
    if "distribution_matching" in terms and not matched_alone:
        yield "TLCM", "distribution matching"
    if "latent_lpips" in terms:
        alone = getattr(chosen, "distance", "") == "none"
        yield "TLCM", "latent LPIPS " + ("in place of the square" if alone else "beside the loss")
    if "preference" in terms:
        yield "TLCM", "preference"
    if "reward" in terms:
        yield "RLCM", "a reward that needs no gradient, on the steps of the student's own sampler"


def _matching(term: Any) -> tuple[str, str]:
    """What distribution matching alone is."""
    if term.noised == "state":
        return "TDM", "distribution matching along the student's own trajectory"
    if term.guidance_times == "own":
        return "decoupled DMD", "distribution matching, its guidance at times of its own"
    return "DMD2", "distribution matching on the student's own rollouts"


def method_name(settings: Settings) -> str:
    """The methods that a recipe takes from, such as "LCM" or "TLCM + Hyper-SD"."""
    return " + ".join(methods(settings))


def reads_latents(stage: StageSettings) -> bool:
    """Whether the states of a stage are noised real latents."""
    return getattr(stage.settings, "mode", "") == "data"


def data(settings: Settings) -> str:
    """A sentence on what the distillation has read."""
    real = [name for name, stage in settings.stages.items() if reads_latents(stage)]
    if not real:
        return "Prompts alone; no image was read."
    if len(real) == len(settings.stages):
        return "Real images, as latents, and their captions."
    return (
        f"Real images, as latents, and their captions in {', '.join(real)}; prompts alone in the "
        "other stages."
    )


def images(settings: Settings) -> str:
    """The sizes that a student was trained on, in words."""
    if buckets := settings.model.size_buckets:
        total = sum(weight for _, weight in buckets)
        parts = ", ".join(f"{size} ({weight / total:.0%})" for size, weight in buckets)
        return f"of several sizes, width x height in pixels: {parts}"
    if (size := settings.model.size) is None:
        return Recipe.images
    return f"{size}, width x height in pixels"


def training_texts(settings: Settings) -> frozenset[str]:
    """Every prompt or caption that a stage was conditioned on.

    Raises:
      FileNotFoundError, ValueError: a file that cannot be read.
    """
    of_data = [reads_latents(stage) for stage in settings.stages.values()]
    texts: list[str] = []
    if not all(of_data):
        texts += read_prompts(settings.prompts)
    if any(of_data):
        texts += map(str, read_npz(settings.latents, ("captions",))["captions"])
    return frozenset(texts)


def sampling_times(settings: Settings) -> dict[int, tuple[int, ...]]:
    """The student's times, by the number of steps from 1 to at most 8.

    A student of whole segments knows all times, and has the table of the authors' release. One
    that was only ever asked at some milestones has these, as evenly as they allow, in at most as
    many steps as there are.
    """
    known: set[int] = set()
    for stage in settings.stages.values():
        if stage.objective == "mlcd":
            return {steps: student_timesteps(steps) for steps in range(1, 9)}
        if getattr(stage.settings, "states", "") == "visited":
            known |= set(stage.settings.rollout_timesteps)
        else:
            known |= set(milestone_indices(stage.settings.segments)[:-1])
    falling = sorted(known, reverse=True)
    times = {}
    for steps in range(1, min(8, len(falling)) + 1):
        times[steps] = student_timesteps(steps)
        if not known.issuperset(times[steps]):
            times[steps] = tuple(falling[i * len(falling) // steps] for i in range(steps))
    return times


def gamma(settings: Settings) -> float:
    """The share of fresh noise that the student is sampled with: its evaluation's, or 1."""
    return 1.0 if settings.evaluation is None else settings.evaluation.gamma


def guidance_scales(settings: Settings) -> tuple[float, ...]:
    """The scales that the teacher was guided with, over all stages and terms."""
    found = {
        chosen.guidance_scale
        for stage in settings.stages.values()
        for chosen in (stage.settings, *stage.terms.values())
        if getattr(chosen, "weight", 1) > 0 and hasattr(chosen, "guidance_scale")
    }
    return tuple(sorted(found))


def keeps_guidance(settings: Settings) -> bool:
    """Whether no guidance was distilled in, so that the student takes it as its teacher does."""
    return guidance_scales(settings) == (1.0,)


def student_guidance_scale(settings: Settings) -> float:
    """The scale that a student is sampled with: its evaluation's first, or 1."""
    chosen = settings.evaluation
    return 1.0 if chosen is None else chosen.student_guidance_scales[0]


def stage_lines(settings: Settings) -> tuple[str, ...]:
    """Each stage with all its settings, and its terms with theirs; no path of a machine."""
    lines = []
    for name, stage in settings.stages.items():
        plain = [
            f"{field.name} = {_value(getattr(stage, field.name))}"
            for field in dataclasses.fields(stage)
            if field.name not in ("objective", "settings", "terms")
        ]
        line = f"{name}: {stage.objective}({_fields(stage.settings)}); {', '.join(plain)}"
        for term, chosen in stage.terms.items():
            line += f"; with {term}({_fields(chosen)})"
        lines.append(line)
    return tuple(lines)


def _fields(chosen: Any) -> str:
    pairs = ((field.name, getattr(chosen, field.name)) for field in dataclasses.fields(chosen))
    return ", ".join(f"{name} = {_value(value)}" for name, value in pairs)


def _value(value: Any) -> str:
    if isinstance(value, str):
        return repr(Path(value).name if "/" in value else value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {_value(v)}" for k, v in value.items())
    if dataclasses.is_dataclass(value):
        return f"({_fields(value)})"
    return str(value)
