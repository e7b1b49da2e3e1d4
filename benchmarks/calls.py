"""How much of the code one prompt passes, from main to the report.

    python -m benchmarks.calls --model miniature/emoji-xl [--list]

Runs the smallest recipe (one prompt, one step of each of the paper's two stages, a report without
scores, a LoRA exported), and counts the distinct functions of `tlcm_jax/` that were called, and
the files they lie in. Nested functions and methods count; lambdas, comprehensions and the bodies of
modules and classes, which run when they are imported, do not. Traced code counts as called.
"""

import argparse
import collections
import inspect
import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import tlcm_jax

ROOT = Path(tlcm_jax.__file__).parent


def recipe(model: str, prompts: Path) -> dict[str, Any]:
    """The smallest recipe with both of the paper's stages."""
    common = dict(steps=1, batch_size=1, learning_rate=1e-4)
    stages = dict(
        mlcd=dict(
            common, objective="mlcd", settings=dict(segments=2, points_per_segment=1, mode="paper")
        ),
        lcd=dict(common, objective="lcd", settings=dict(segments=2, rollout_timesteps=(999, 499))),
    )
    return dict(
        name="calls",
        model=dict(path=model),
        prompts=(str(prompts),),
        adapter=dict(rank=4, alpha=4.0, merged=True),
        stage_order=tuple(stages),
        stages=stages,
        evaluation=dict(prompts=(str(prompts),), steps=(1,), pictures=1),
        export=("lora",),
    )


class Calls:
    """A context that collects the code objects of `tlcm_jax/` that are called in it."""

    def __init__(self) -> None:
        self.seen: set[Any] = set()

    def __enter__(self) -> "Calls":
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]

    def _profile(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(ROOT)):
            self.seen.add(code)

    def by_file(self) -> dict[str, list[str]]:
        """Names of the functions, by file."""
        found: dict[str, list[str]] = collections.defaultdict(list)
        for code in self.seen:
            if code.co_flags & inspect.CO_OPTIMIZED and not code.co_name.startswith("<"):
                file = str(Path(code.co_filename).relative_to(ROOT))
                found[file].append(code.co_qualname)
        return {file: sorted(names) for file, names in sorted(found.items())}


def main() -> None:
    """Prints the counts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="miniature/emoji-xl")
    parser.add_argument("--list", action="store_true", help="name the functions")
    args = parser.parse_args()
    from tlcm_jax import main as command

    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("a red apple\n", encoding="utf-8")
        config = recipe(args.model, prompts)
        with Calls() as calls:
            command.run(config, Path(folder) / "run", progress=False)
    found = calls.by_file()
    if args.list:
        for file, names in found.items():
            print(f"{file}: {', '.join(names)}")
    print(f"{sum(map(len, found.values()))} functions in {len(found)} files")


if __name__ == "__main__":
    main()
