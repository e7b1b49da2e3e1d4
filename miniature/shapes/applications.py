"""Measures what a student of shapes-xl is used for: maps that steer it, and Chinese prompts.

    python -m miniature.shapes.applications --student RUN --control --layout --chinese --sheet DIR

`--control`: test scenes' outlines through a ControlNet, with the test prompts. `--layout`: test
scenes' layouts through a T2I-Adapter, with prompts that name a colour and nothing else, as style
prompts say how a given layout is to be painted. `--chinese`: the test prompts in English, and in
Chinese through the adapter, from the same noise. In each the student draws in a few steps without
guidance, and its teacher in 25 with.

A picture keeps to a map if what stands out of its ground, F, is what the map's objects cover, S,

    |F and S| / |F or S| >= 0.7,                                                 (1)

and is at its place if it holds one object, whose centre is within 2 pixels of the map's.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from miniature.shapes.captions import english
from miniature.shapes.maps import layout, outline, silhouettes
from miniature.shapes.parser import foreground, satisfies
from miniature.shapes.prompts import prompt_sets, spec_of
from miniature.shapes.render import render
from miniature.shapes.scene import COLOURS, RUNGS, SIDE, TEST_START, Group, Scene, Spec, draw_scene
from miniature.shapes.scorer import parsed, spec_of_caption
from miniature.shapes.splits import HELD_PAIRS
from tlcm_jax import paths
from tlcm_jax.config.workdir import trained_times
from tlcm_jax.families.base import LatentModel
from tlcm_jax.generation.control import Control
from tlcm_jax.generation.generate import GenerationOptions, generate, generate_teacher
from tlcm_jax.sample import load_with_adapter

NETWORKS = paths.MINIATURE / "shapes/networks"
CONTROLNET, ADAPTER, CHINESE = "outline-controlnet", "layout-t2i-adapter", "chinese"
_RUNG = RUNGS["r1"]
_KEPT, _NEAR = 0.7, 2.0
_FIRST_SCENE = TEST_START + 10_000  # none of those that scorers' real renders show
_SEED = 11


def kept(images: UInt8[np.ndarray, "n 64 64 3"], scenes: Sequence[Scene]) -> dict[str, np.ndarray]:
    """What of each picture is as its map says.

    Args:
      images: pictures.
      scenes: that the maps are of, one object each.

    Returns:
      Truth values `[n]`: `overlap`, equation (1); `place`; `shape` and `size`, the parser's against
      the scene's, also where no caption names them.
    """
    found: dict[str, list[bool]] = {name: [] for name in ("overlap", "place", "shape", "size")}
    for image, scene in zip(images, scenes, strict=True):
        (thing,) = scene.things
        inside, shown = silhouettes(scene) > 0.5, foreground(image)
        found["overlap"].append(overlap(shown, inside) >= _KEPT)
        objects = parsed(image, _RUNG).objects
        one = objects[0] if len(objects) == 1 else None
        near = one is not None and np.hypot(one.x - thing.x, one.y - thing.y) <= _NEAR
        found["place"].append(bool(near))
        for name in ("shape", "size"):
            found[name].append(one is not None and getattr(one, name) == getattr(thing, name))
    return {name: np.array(values) for name, values in found.items()}


def overlap(one: Bool[np.ndarray, "h w"], other: Bool[np.ndarray, "h w"]) -> float:
    """Intersection over union."""
    return float(np.sum(one & other) / max(np.sum(one | other), 1))


def right(images: UInt8[np.ndarray, "n 64 64 3"], specs: Sequence[Spec]) -> Bool[np.ndarray, " n"]:
    """All checks of each picture's caption."""
    pairs = zip(images, specs, strict=True)
    return np.array([satisfies(parsed(image, _RUNG), spec) for image, spec in pairs])


def scenes_of(specs: Sequence[Spec]) -> list[Scene]:
    """A test scene of each spec."""
    return [draw_scene(spec, _FIRST_SCENE + i, _RUNG) for i, spec in enumerate(specs)]


def colour_specs(scenes: Sequence[Scene]) -> list[Spec]:
    """Prompts that name a colour alone: neither the scene's own, nor one of which the teacher never
    saw the scene's shape.
    """  # noqa: D205
    found = []
    for i, scene in enumerate(scenes):
        (thing,) = scene.things
        others = [
            colour
            for colour in COLOURS
            if colour != thing.colour and (thing.shape, colour) not in HELD_PAIRS
        ]
        found.append(Spec(groups=(Group(colour=others[i % len(others)]),)))
    return found


class Drawer:
    """The student and its teacher, on the same prompts and noise."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.model, self.adapter, self.base = load_with_adapter(args.student, args.lora)
        self.times = trained_times(args.student)
        self.guidance_scale, self.batch = args.guidance_scale, args.batch

    def __call__(
        self,
        prompts: Sequence[str],
        steps: int,
        controls: Sequence[Control] = (),
        chinese: LatentModel | None = None,
    ) -> UInt8[np.ndarray, "n 64 64 3"]:
        """Images in a few steps by the student, in 25 by the teacher."""
        options = GenerationOptions(controls=controls, batch_size=self.batch)
        if steps > 8:
            base = chinese or self.base
            return generate_teacher(base, prompts, steps, self.guidance_scale, _SEED, options)
        model, times = chinese or self.model, self.times.get(steps)
        return generate(
            model, prompts, steps, _SEED, self.adapter, options=options, timesteps=times
        )


def show(label: str, values: Mapping[str, Float[np.ndarray, " n"]]) -> None:
    """Prints a row: the share of each."""
    shares = ", ".join(f"{name} {100 * np.mean(value):.1f} %" for name, value in values.items())
    print(f"{label:44s} {shares}", flush=True)


def measure_maps(
    draw: Drawer, path: Path, kind: str, args: argparse.Namespace, specs: Sequence[Spec]
) -> dict[str, np.ndarray]:
    """Prints the rows of a control network; returns images for the sheet, by their row's name."""
    map_of = outline if kind == "control" else layout
    scenes = scenes_of(specs)
    if kind == "layout":
        specs = colour_specs(scenes)
    prompts = [english(spec) for spec in specs]
    maps = np.stack([map_of(scene) for scene in scenes])
    network = draw.base.load_control(path)
    renders = np.stack([render(scene) for scene in scenes])

    def report(label: str, images: np.ndarray) -> None:
        values = kept(images, scenes)
        values["all checks"] = right(images, specs)
        values["both"] = values["overlap"] & values["all checks"]
        show(f"{kind}: {label}", values)

    sheet = {"map": np.broadcast_to(maps, renders.shape)}
    report("the scenes' own renders", renders)
    report("student, 2 steps, without the map", draw(prompts, 2))
    ends = (1.0, 0.5) if kind == "layout" else (1.0,)
    for end in ends:
        control = Control(network=network, images=maps, scale=args.scale, end=end)
        part = "" if end == 1 else f", first {end:g} of the steps"
        for steps in args.steps:
            who = "teacher" if steps > 8 else "student"
            images = draw(prompts, steps, [control])
            report(f"{who}, {steps} steps{part}", images)
            if end == 1 and steps in (2, 25):
                sheet[f"{kind}, {who}, {steps} steps"] = images
    return sheet


def measure_chinese(
    draw: Drawer, path: Path, count: int, counts: Sequence[int]
) -> dict[str, np.ndarray]:
    """Prints the rows of English and Chinese; returns images for the sheet."""
    entries = spread(prompt_sets(_RUNG)["test"], count)
    specs = [spec_of(entry) for entry in entries]
    file = (paths.MINIATURE / "shapes/prompts/r1/chinese.txt").read_text(encoding="utf-8")
    chinese = spread(file.splitlines(), count)
    assert [spec_of_caption(text) for text in chinese] == specs
    model, base = draw.model.with_text_adapter(path), draw.base.with_text_adapter(path)
    sheet = {}
    for steps in counts:
        who = "teacher" if steps > 8 else "student"
        ours = draw([entry["prompt"] for entry in entries], steps)
        theirs = draw(chinese, steps, chinese=base if steps > 8 else model)
        values = {"English": right(ours, specs), "Chinese": right(theirs, specs)}
        show(f"chinese: {who}, {steps} steps, all checks", values)
        if steps == 3:
            sheet = {"English, 3 steps": ours, "Chinese, 3 steps": theirs}
    return sheet


def spread(items: Sequence, count: int) -> list:
    """`count` of them from beginning to end; all by 0."""
    if not count or count >= len(items):
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, count).astype(int)]


def write_sheet(path: Path, rows: Mapping[str, np.ndarray], columns: int = 12) -> None:
    """A row of pictures for each of `rows`, twice as large."""
    lines = []
    for images in rows.values():
        picked = images[np.linspace(0, len(images) - 1, columns).astype(int)]
        lines.append(picked.transpose(1, 0, 2, 3).reshape(SIDE, columns * SIDE, 3))
    whole = np.concatenate(lines).repeat(2, axis=0).repeat(2, axis=1)
    Image.fromarray(whole).save(path, optimize=True)
    print(f"{path}: {'; '.join(rows)}")


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", required=True, help="a run's workdir, or a model with --lora")
    parser.add_argument("--lora", action="append", help="the student's, on --student as its model")
    parser.add_argument("--networks", type=Path, default=NETWORKS)
    parser.add_argument("--control", action="store_true")
    parser.add_argument("--layout", action="store_true")
    parser.add_argument("--chinese", action="store_true")
    parser.add_argument("--count", type=int, default=0, help="test prompts; 0 for all")
    parser.add_argument("--steps", type=int, nargs="*", default=[2, 3, 4, 25])
    parser.add_argument("--scale", type=float, default=1.0, help="of the residuals")
    parser.add_argument("--guidance_scale", type=float, default=3.0, help="of the teacher")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--sheet", type=Path, help="PNG to write")
    args = parser.parse_args()
    draw, rows = Drawer(args), {}
    specs = [spec_of(entry) for entry in spread(prompt_sets(_RUNG)["test"], args.count)]
    for kind, name in (("control", CONTROLNET), ("layout", ADAPTER)):
        if getattr(args, kind):
            rows |= {
                f"{kind}: {label}": images
                for label, images in measure_maps(
                    draw, args.networks / name, kind, args, specs
                ).items()
            }
    if args.chinese:
        rows |= measure_chinese(draw, args.networks / CHINESE, args.count, args.steps)
    if args.sheet and rows:
        write_sheet(args.sheet, rows)


if __name__ == "__main__":
    main()
