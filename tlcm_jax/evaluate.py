"""Generates with a distilled model and scores it at several step counts, beside its teacher.

    python -m tlcm_jax.evaluate --model runs/emoji --prompts miniature/prompts/heldout.txt \
        --steps 1,2,3,4,8 --scores miniature.judge --output evaluations/emoji

    python -m tlcm_jax.evaluate --model runs/sdxl --prompts captions_val2017.json \
        --protocol tlcm --scorers scorers --output evaluations/table1

    python -m tlcm_jax.evaluate --model runs/sdxl --prompts prompts.txt --steps 4 \
        --baseline dmd2=dmd2_sdxl_4step_lora.safetensors --output evaluations/rivals

--protocol measures as a published table does (`evaluation.protocols`): its number of prompts, its
steps and those of its scores whose weights lie in --scorers, each in a folder of its name.
--baseline puts published models beside, each sampled as its authors say (`evaluation.baselines`).
PATH of --model is a diffusers pipeline folder, a single-file checkpoint, a hub id or the workdir of
a run. Writes `metrics.json`, `scores.md`, `report.html` and `samples/`. The teacher is the model
without its adapter; a model that has none is compared with --teacher, if that is given. All images
are kept in `images/` of the workdir, or else of the output: the same command, stopped and begun
again, makes only those that are missing. --lpips adds the diversity, --layout the folders that
other benchmarks read (`evaluation.more_draws`), --blind a page `blind.html` on which to vote
without knowing whose image is whose.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging

from tlcm_jax.config.size_flags import define_size_flags, given_size
from tlcm_jax.config.workdir import (
    drawn_with,
    is_workdir,
    student_scales,
    trained_resolution,
    trained_times,
)
from tlcm_jax.data.prompt_sets import read_prompt_set
from tlcm_jax.diffusion.samplers import SAMPLERS
from tlcm_jax.evaluation import report as evaluation_report
from tlcm_jax.evaluation.baselines import BaselineFile, contestants
from tlcm_jax.evaluation.evaluate import check_steps, evaluate
from tlcm_jax.evaluation.final_eval import IMAGES
from tlcm_jax.evaluation.more_draws import LAYOUTS, layout_rows, with_diversity, write_layout
from tlcm_jax.evaluation.protocols import PROTOCOLS, load_protocol
from tlcm_jax.evaluation.reporting.blind import write_blind_page
from tlcm_jax.evaluation.reporting.provenance import provenance
from tlcm_jax.evaluation.scorers.pairwise import lpips_distance
from tlcm_jax.evaluation.scorers.table import load_scorers
from tlcm_jax.families.load import load_model
from tlcm_jax.generation.generate import GenerationOptions
from tlcm_jax.sample import load_with_adapter
from tlcm_jax.training import compilation
from tlcm_jax.training.sharding import on_local_devices


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags in `values`."""
    here = {"flag_values": values}
    must = {"required": True, **here}
    flags.DEFINE_string("model", None, "Folder, file, hub id or workdir.", **must)
    flags.DEFINE_multi_string("lora", None, "LoRA to put onto the model: PATH[:WEIGHT].", **here)
    flags.DEFINE_string("vae", None, "Another autoencoder: folder, file or hub id.", **here)
    flags.DEFINE_string("teacher", None, "Undistilled pipeline folder to compare with.", **here)
    flags.DEFINE_multi_string("prompts", None, "Prompt file; may be given again.", **must)
    flags.DEFINE_integer("limit", None, "Prompts used of a file; all.", lower_bound=0, **here)
    flags.DEFINE_list("steps", None, "The student's step counts; 1,2,3,4,8.", **here)
    flags.DEFINE_enum("protocol", None, list(PROTOCOLS), "Whose table to measure as.", **here)
    flags.DEFINE_string("scorers", None, "With --protocol: folders by score.", **here)
    flags.DEFINE_list("scores", "", "Scorers, as NAME or NAME=PATH; commas between.", **here)
    flags.DEFINE_list("guidance_scale", None, "The teacher's; the run's own, or 8.", **here)
    flags.DEFINE_list(
        "student_guidance_scale", None,
        "A student's that was distilled without guidance; the run's own, or 1, none.", **here,
    )  # fmt: skip
    flags.DEFINE_list("gamma", None, "Shares of fresh noise; the run's own, or 1.", **here)
    flags.DEFINE_list("sampler", "consistency", f"Student's: {', '.join(SAMPLERS)}.", **here)
    flags.DEFINE_list("undistilled", "", "Steps of the teacher by the student's sampler.", **here)
    flags.DEFINE_multi_string("baseline", None, "NAME=PATH or NAME:STEPS=PATH.", **here)
    flags.DEFINE_integer("seed", 0, "Of the noise.", **here)
    define_size_flags(values, "the run's, or the model's own")
    flags.DEFINE_string("lpips", None, "Folder of LPIPS: also score the diversity.", **here)
    flags.DEFINE_integer("draws", 4, "Images of a prompt, for --lpips.", lower_bound=2, **here)
    flags.DEFINE_integer("diverse", 100, "Prompts of a set, for --lpips.", lower_bound=1, **here)
    flags.DEFINE_enum("layout", None, list(LAYOUTS), "Also write as a benchmark reads.", **here)
    flags.DEFINE_bool("blind", False, "Also write a page on which to vote, blind.", **here)
    flags.DEFINE_integer("batch_size", 25, "Images at a time.", lower_bound=1, **here)
    flags.DEFINE_integer("pictures", 12, "Prompts in the report.", lower_bound=1, **here)
    flags.DEFINE_string("output", None, "Folder to write into.", **must)


def main(arguments: Sequence[str]) -> None:
    """Evaluates; anything wrong ends the process with one line that says what."""
    logging.set_verbosity(logging.INFO)
    # Orbax logs each of its options, through the same logger.
    logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
    try:
        if arguments[1:]:
            raise ValueError(f"unexpected arguments {list(arguments[1:])}; use --steps 1,2,4")
        run(flags.FLAGS)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"evaluate: {error}")


def run(values: flags.FlagValues) -> None:
    """Does what the flags say."""
    start = time.monotonic()
    preset = PROTOCOLS[values.protocol] if values.protocol else None
    # What is quickly checked, before anything is loaded.
    size = given_size(values)
    steps = check_steps(values.steps or (preset.steps if preset else (1, 2, 3, 4, 8)))
    limit = values.limit if values.limit is not None else preset.count if preset else 0
    prompt_sets = [read_prompt_set(path).first(limit) for path in values.prompts]
    files = [BaselineFile.parse(text) for text in values.baseline or ()]
    rows = [
        layout_rows(values.layout, path, prompts)
        for path, prompts in zip(values.prompts, prompt_sets, strict=True)
        if values.layout
    ]
    distance = None if values.lpips is None else lpips_distance(values.lpips)
    scales, gammas = (_numbers(values, name) for name in ("guidance_scale", "gamma"))
    scorers = load_scorers(values.scores)
    if preset is not None:
        if values.scorers is None:
            raise ValueError("--protocol needs --scorers: the folder of its scores' folders")
        preset, more = load_protocol(values.protocol, values.scorers)
        scorers = (*more, *(each for each in scorers if each.name not in preset.scores))
    load = functools.partial(load_model, shardings=on_local_devices())
    model, adapter, base = load_with_adapter(values.model, values.lora, vae=values.vae, load=load)
    teacher = None if adapter is None and base is model else base
    if values.teacher is not None:
        teacher = load(values.teacher)
    output = Path(values.output)
    store = (Path(values.model) if is_workdir(values.model) else output) / IMAGES
    resolution = size or trained_resolution(values.model)
    options = GenerationOptions(
        resolution=resolution, batch_size=values.batch_size, progress=sys.stderr.isatty()
    )
    result = evaluate(
        model,
        prompt_sets,
        lora=adapter,
        teacher=teacher,
        steps=steps,
        guidance_scales=scales or [drawn_with(values.model, "guidance_scale", 8.0)],
        gammas=gammas or [drawn_with(values.model, "gamma", 1.0)],
        student_guidance_scales=_numbers(values, "student_guidance_scale")
        or student_scales(values.model, bool(values.lora)),
        samplers=values.sampler,
        timesteps={} if values.lora else trained_times(values.model),
        seed=values.seed,
        resolution=resolution,
        undistilled=check_steps(values.undistilled) if values.undistilled else (),
        baselines=tuple(contestants(files, teacher or base, steps, load)),
        scorers=scorers,
        pictures=values.pictures,
        store=store,
        batch_size=options.batch_size,
        progress=options.progress,
    )
    if distance is not None:
        result = with_diversity(result, distance, values.draws, values.diverse, options, store)
    for one_set, of_prompts in zip(result.sets, rows, strict=False):
        for one in one_set.generated:
            seed, prompts = values.seed, one_set.prompts
            write_layout(values.layout, output, one.by, prompts, of_prompts, seed, options, store)
    report = evaluation_report.build_report(
        result,
        title=f"Evaluation of {values.model}",
        pictures=values.pictures,
        config={
            **{
                name: values[name].value
                for name in ("model", "lora", "prompts", "scores", "baseline")
            },
            **({} if resolution is None else {"resolution": str(resolution)}),
            **({} if preset is None else {"protocol": dataclasses.asdict(preset)}),
        },
        provenance=provenance(time.monotonic() - start),
    )
    evaluation_report.save(output, result, report)
    if values.blind:
        write_blind_page(output / "blind.html", report)
    print(f"{values.output}/report.html, scores.md, metrics.json and samples/")


def _numbers(values: flags.FlagValues, name: str) -> list[float]:
    """A flag's numbers."""
    try:
        return [float(text) for text in values[name].value or ()]
    except ValueError:
        raise ValueError(f"--{name} {','.join(values[name].value)}: give numbers") from None


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    compilation.use_cache()
    app.run(main)
