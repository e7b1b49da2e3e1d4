"""Kills a run again and again, and asks that it ends, bit for bit, where an undisturbed one does.

    python -m benchmarks.kill_soak --kills 200 --output runs/kill_soak

A process that has imported everything and touched no device starts each attempt by a fork; the
attempt is killed (SIGKILL) at a moment drawn from those below, and the next one resumes its
workdir. An attempt that comes to its end is compared with the undisturbed run: every leaf of the
last state, every row but its times, every tensor exported. Subjects: `engine`, the stages,
checkpoints and rows of the library on a linear regression, seconds a kill; `main`, the whole
command on a tiny random SDXL, to its report and exports; and `toy`, the same on the tests' toy
family, whose networks compile in seconds. Say the same command again to go on.
"""

import argparse
import collections
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from tests.support import toy_family

TIMES = ("pairs_per_second", "nfe_per_second", "first_step_seconds")
STEPS = 20  # of each of two stages
FEATURES = 64
# What is waited for, with its weight, of each subject; a moment of up to `LATER` s is added.
EVENTS = {
    "engine": {"save": 8, "named": 4, "stage": 4, "drop": 2, "row": 1, "any": 3},
    "main": {"save": 3, "named": 1, "stage": 2, "export": 4, "report": 4, "any": 2},
}
EVENTS["toy"] = EVENTS["main"]
LATER = 0.05


def engine(
    workdir: Path, steps: int = STEPS, hooks: tuple = (), log_every: int = 1,
    checkpoint_every: int = 2, progress: bool = False,
) -> None:  # fmt: skip
    """The loop on a linear regression, two stages of so many steps each."""
    import optax

    from tlcm_jax.training import loop
    from tlcm_jax.training.checkpoints import Checkpoints
    from tlcm_jax.training.lock import WorkdirLock
    from tlcm_jax.training.metrics import MetricsWriter
    from tlcm_jax.training.pairs import PairSource
    from tlcm_jax.training.retention import Keep
    from tlcm_jax.training.stage import StageSpec

    def sample(params: dict, frozen: dict, batch: jax.Array, keys: jax.Array) -> dict:
        noise = jax.vmap(lambda key: jax.random.normal(key, (2, FEATURES)))(keys)
        x = (batch[:, None] + noise).reshape(-1, FEATURES)
        return {"x": x, "y": jnp.sin(x @ frozen["w"])}

    def loss(params: dict, frozen: dict, pairs: dict, keys: jax.Array, others: dict) -> tuple:
        noise = jax.vmap(jax.random.normal)(keys)
        return ((pairs["x"] @ params["w"] - pairs["y"]) ** 2).mean(-1) + noise, {"noise": noise}

    def spec(name: str, epochs: int) -> StageSpec:
        return StageSpec(
            name=name,
            steps=steps,
            pairs=PairSource(
                sample=sample,
                batches=lambda r: jnp.cos(jnp.arange(8.0 * FEATURES).reshape(8, FEATURES) + r),
                prompts=8,
                pairs_per_prompt=2,
                batch_size=8,
                epochs=epochs,
            ),
            loss=loss,
            optimizer=optax.adamw(1e-2),
            frozen={"w": jnp.eye(FEATURES)},
            nfe_per_pair=1.0,
            ema_decay=0.9,
        )

    with WorkdirLock(workdir):
        checkpoints = Checkpoints(workdir / "checkpoints", keep=Keep(last=2, every=7))
        result = loop.run(
            [spec("first", 1), spec("second", 3)],
            {"w": jnp.zeros((FEATURES, FEATURES))},
            jax.random.key(3),
            checkpoints=checkpoints,
            writer=MetricsWriter(workdir),
            settings=loop.LoopSettings(
                log_every=log_every, checkpoint_every=checkpoint_every, progress=progress
            ),
            hooks=hooks,
        )
        checkpoints.close()
        state = result.state.replace(key=jax.random.key_data(result.state.key))
        digest = hashlib.sha256()
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
        (workdir / "state.sha256").write_text(digest.hexdigest())


def whole(workdir: Path) -> None:
    """The main command on the teacher beside the workdir."""
    from tlcm_jax.main import run

    run(whole_recipe(workdir.parent), workdir, progress=False)


def whole_recipe(world: Path) -> dict:
    """The recipe of `whole`, of the teacher and prompts in a folder."""
    toy = (world / "teacher" / "toy.json").exists()
    stage = dict(
        objective="mlcd",
        steps=STEPS,
        batch_size=2,
        learning_rate=1e-3,
        settings=dict(segments=2, points_per_segment=1, guidance_scale=2.0),
    )
    return dict(
        name="soak",
        model=dict(path=str(world / "teacher")),
        prompts=[str(world / "prompts.txt")],
        adapter=dict(rank=2, alpha=0.25, **(dict(targets=["fc1", "fc2"]) if toy else {})),
        stages=dict(first=stage, second=stage),
        stage_order=["first", "second"],
        log_every=1,
        checkpoint_every=4,
        evaluation=dict(prompts=[str(world / "prompts.txt")], steps=[2], guidance_scale=2.0),
        export=["lora", "pipeline"],
    )


def write_world(subject: str, folder: Path) -> None:
    """The teacher and prompts of `whole`; in a process of its own, since it touches a device."""
    child = os.fork()
    if not child:
        from tests.support.tiny_pipeline import write_tiny_pipeline
        from tests.support.toy_family import write_toy

        (write_toy if subject == "toy" else write_tiny_pipeline)(folder / "teacher")
        (folder / "prompts.txt").write_text("a red cat\na cat icon\nan icon of a cat\n")
        os._exit(0)
    os.waitpid(child, 0)


SUBJECTS = {"engine": engine, "main": whole, "toy": whole}


def start(subject: str, workdir: Path) -> int:
    """Forks an attempt; its output goes to a file beside the workdir."""
    child = os.fork()
    if child:
        return child
    try:
        log = os.open(workdir.parent / "attempt.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        SUBJECTS[subject](workdir)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def seen(workdir: Path) -> dict[str, tuple]:
    """What each event is told by; an event has come when its value changes."""
    names = sorted(os.listdir(folder)) if (folder := workdir / "checkpoints").is_dir() else []
    numbers = [int(name) for name in names if name.isdigit()]
    rows = workdir / "metrics.jsonl"
    exported = workdir / "export"
    return {
        "save": tuple(name for name in names if "tmp" in name),
        "named": (max(numbers, default=0),),
        "drop": (min(numbers, default=0),),
        "stage": (max(numbers, default=0) >= STEPS or f"{STEPS}.orbax-checkpoint-tmp" in names,),
        "row": (rows.stat().st_size if rows.exists() else 0,),
        "export": tuple(sorted(os.listdir(exported))) if exported.is_dir() else (),
        "report": tuple(sorted(p.name for p in workdir.glob("*") if p.name != ".lock")),
    }


def attempt(subject: str, workdir: Path, rng: random.Random, longest: float) -> str | None:
    """One attempt and its kill; what was waited for, or None where it came to its end before."""
    weights = EVENTS[subject]
    event = rng.choices(list(weights), list(weights.values()))[0]
    count, later = rng.randint(1, 5) if event in ("save", "named", "row") else 1, LATER
    until = time.monotonic() + (rng.uniform(0, longest) if event == "any" else 1e9)
    before = seen(workdir).get(event)
    child = start(subject, workdir)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            if status:
                raise SystemExit(
                    f"an attempt failed, which is a finding: {workdir}, "
                    f"{(workdir.parent / 'attempt.log').read_text()[-3000:]}"
                )
            return None
        if event == "any":
            come = time.monotonic() > until
        else:
            try:
                now = seen(workdir)[event]
            except FileNotFoundError:  # gone while it was looked at
                now = before
            if now != before:
                count, before = count - 1, now
            come = count <= 0
        if come:
            time.sleep(rng.uniform(0, later))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            return event if os.WIFSIGNALED(status) else None
        time.sleep(0.001)


def result(workdir: Path) -> dict:
    """What a finished run left, to be compared."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]
    tensors = {
        f"{path.relative_to(workdir)}:{name}": hashlib.sha256(value.tobytes()).hexdigest()
        for path in sorted((workdir / "export").rglob("*.safetensors"))
        for name, value in load_file(path).items()
    }
    state = workdir / "state.sha256"
    return {
        "rows": rows,
        "tensors": tensors,
        "state": state.read_text() if state.exists() else "",
        "left": sorted(str(p.relative_to(workdir)) for p in workdir.rglob("*.part")),
    }


def prepare(subject: str, folder: Path) -> None:
    """The world of a subject, and its undisturbed run."""
    if subject == "toy":
        toy_family.register()
    if subject != "engine" and not (folder / "prompts.txt").exists():
        write_world(subject, folder)
    if not (folder / "whole.json").exists():
        shutil.rmtree(folder / "whole", ignore_errors=True)
        (folder / "whole").mkdir()
        began = time.monotonic()
        _, status = os.waitpid(start(subject, folder / "whole"), 0)
        if status:
            raise SystemExit((folder / "attempt.log").read_text()[-3000:])
        found = {**result(folder / "whole"), "seconds": time.monotonic() - began}
        (folder / "whole.json").write_text(json.dumps(found))


def main() -> None:
    """Kills until there are enough, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--subject", choices=sorted(SUBJECTS), default="engine")
    parser.add_argument("--output", type=Path, default=Path("runs/kill_soak"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    # Of the fork: no device has been touched, so no thread of JAX's is running.
    warnings.filterwarnings("ignore", message="os.fork")
    folder = (args.output / args.subject).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    cache = str(folder / "compiled")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    import tlcm_jax.main  # noqa: F401  (all imports before the first fork)
    from tlcm_jax.config import run  # noqa: F401

    prepare(args.subject, folder)
    wanted = json.loads((folder / "whole.json").read_text())
    log = folder / "kills.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    kills = collections.Counter(json.loads(line)["event"] for line in lines)
    equal = kills.pop("equal", 0)
    rng = random.Random(f"{args.seed} {len(lines)}")
    workdir = folder / "run"
    # The last run is always brought to its end, so that every kill is compared.
    while kills.total() < args.kills or workdir.exists():
        workdir.mkdir(exist_ok=True)
        if kills.total() < args.kills:
            event = attempt(args.subject, workdir, rng, wanted["seconds"])
        else:
            _, status = os.waitpid(start(args.subject, workdir), 0)
            if status:
                raise SystemExit((folder / "attempt.log").read_text()[-3000:])
            event = None
        if event is None:
            found = result(workdir)
            for name, value in found.items():
                if value != wanted[name]:
                    raise SystemExit(f"{workdir}: {name} differ from the undisturbed run's")
            shutil.rmtree(workdir)
            equal, event = equal + 1, "equal"
        else:
            kills[event] += 1
        with log.open("a") as file:
            file.write(json.dumps({"event": event, "at": time.time()}) + "\n")
        print(f"{kills.total()} kills, {equal} runs bit-equal", flush=True)
    print(f"{args.subject}: {kills.total()} kills over {equal} runs, all bit-equal: {dict(kills)}")


if __name__ == "__main__":
    main()
