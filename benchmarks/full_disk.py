"""Fills the disk under the main command, at every kind of write, and looks at what is left.

    python -m benchmarks.full_disk --output runs/full_disk         # as root: it mounts a tmpfs

The workdir of a whole run (of the tests' toy family) lies on a small file system of its own, which
is filled at once (but for 0 to 64 KiB) when one of these is seen: a row of metrics, a checkpoint
that is being written, one that has got its name, a preview, the exports, the pictures that are
kept, the report. Then it asks that the command ended with one line that says so and, in the
training, names a whole checkpoint to go on from; that nothing half written stands under a final
name; and that the same command, once there is room, ends bit for bit where an undisturbed one does.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

from PIL import Image
from safetensors.numpy import load_file

from benchmarks.kill_soak import STEPS, result, whole_recipe, write_world
from tests.support import toy_family
from tlcm_jax.training import integrity

# Of the file system: a run's own files take some 12 MB.
SIZE = "64m"
LARGEST_REST = 64 * 1024
REPORT = ("metrics.json", "scores.md", "report.html")
EVENTS = ("row", "saving", "named", "preview", "export", "pictures", "report")
TRAINING = ("row", "saving", "named", "preview")


def seen(workdir: Path, event: str) -> object:
    """What an event is told by; it has come when its value changes."""

    def names(folder: Path) -> list[str]:
        return sorted(os.listdir(folder)) if folder.is_dir() else []

    checkpoints = names(workdir / "checkpoints")
    if event == "row":
        rows = workdir / "metrics.jsonl"
        return rows.stat().st_size if rows.exists() else 0
    if event == "saving":
        return [name for name in checkpoints if "tmp" in name]
    if event == "named":
        return max((int(name) for name in checkpoints if name.isdigit()), default=0)
    if event == "preview":
        return [name for name in names(workdir / "samples") if name[:1].isdigit()]
    if event == "report":
        return [name for name in REPORT if (workdir / name).exists()]
    if event == "export":  # which is over soon once it has begun
        return str(2 * STEPS) in checkpoints
    folder = workdir / "images"
    return sorted(str(path) for path in folder.rglob("*")) if folder.is_dir() else []


def command(workdir: Path, recipe: Path, log: Path) -> int:
    """Forks the main command; what it says goes to `log`. Its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        from absl import logging

        from tlcm_jax import main

        logging.set_verbosity(logging.ERROR)
        logging.use_absl_handler()
        main.quiet_libraries()
        words = ["main", f"--config={recipe}", f"--workdir={workdir}", "--noprogress"]
        main.parse_flags([*words, f"--compilation_cache={recipe.parent / 'compiled'}"])
        main.main(["main"])
        code = 0
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        else:
            code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def fill(folder: Path, rest: int) -> Path:
    """Takes all room of a file system but `rest` bytes."""
    filler = folder / "filler"
    with filler.open("wb") as file:
        while (free := shutil.disk_usage(folder).free) > rest + 4096:
            try:
                os.posix_fallocate(file.fileno(), file.seek(0, 2), max(4096, free - rest))
            except OSError:  # the run took some of it meanwhile
                continue
    return filler


def half_written(workdir: Path) -> list[str]:
    """Files under final names that are not whole."""
    wrong = []

    def look(path: Path, read: object) -> None:
        try:
            read()  # type: ignore[operator]
        except Exception as error:
            wrong.append(f"{path}: {error}")

    for path in sorted(workdir.rglob("*")):
        inside = path.relative_to(workdir).parts
        hidden = any(part.startswith(".") or "tmp" in part for part in inside)
        if hidden or inside[0] == "checkpoints" or not path.is_file():
            continue
        if path.suffix == ".json":
            look(path, lambda path=path: json.loads(path.read_text()))
        elif path.suffix == ".safetensors":
            look(path, lambda path=path: load_file(path))
        elif path.suffix == ".png":
            look(path, lambda path=path: Image.open(path).load())
        elif path.suffix == ".html" and not path.read_text().rstrip().endswith("</html>"):
            wrong.append(f"{path} is cut")
        elif path.suffix in (".md", ".txt") and not path.read_text().endswith("\n"):
            wrong.append(f"{path} is cut")
        if path.name.endswith((".part", ".old")):
            wrong.append(f"{path} stayed")
    for folder in (workdir / "checkpoints").glob("*"):
        if folder.name.isdigit() and (reason := integrity.damage(folder)):
            wrong.append(f"{folder}: {reason}")
    return wrong


def attempt(event: str, mount: Path, recipe: Path, rng: random.Random, count: int) -> str:
    """Fills the disk once at an event; what the command said, "" if it ended before."""
    workdir, log = mount / "run", recipe.parent / "attempt.log"
    before = seen(workdir, event)
    child, filler = command(workdir, recipe, log), None
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        try:
            now = seen(workdir, event)
        except FileNotFoundError:  # gone while it was looked at
            now = before
        if filler is None and now != before:
            count, before = count - 1, now
            if count <= 0:
                # The end's files are small: some room would take them.
                rest = rng.choice((0, rng.randrange(LARGEST_REST))) if event in TRAINING else 0
                filler = fill(mount, rest)
        time.sleep(0.001)
    text = log.read_text().strip()
    if filler is not None:
        filler.unlink()
    if os.waitstatus_to_exitcode(status) == 0:
        return ""
    lines = text.splitlines()
    if len(lines) != 1 or not lines[0].startswith("error: "):
        raise SystemExit(f"{event}: not one line, but: {text[-3000:]}")
    if not re.search(r"[Nn]o space left|Disk quota", lines[0]):
        raise SystemExit(f"{event}: the line does not say what is wrong: {lines[0]}")
    if event in TRAINING:
        found = re.search(r"last good checkpoint is (none yet|\S+/(\d+))", lines[0])
        if not found:
            raise SystemExit(f"{event}: no last good checkpoint is named: {lines[0]}")
        if found[2] and (reason := integrity.damage(workdir / "checkpoints" / found[2])):
            raise SystemExit(f"{event}: checkpoint {found[2]} is not good: {reason}")
    if wrong := half_written(workdir):
        raise SystemExit(f"{event}: half written: {'; '.join(wrong)}")
    return lines[0]


def main() -> None:
    """Fills at every event, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/full_disk"))
    parser.add_argument("--events", default=",".join(EVENTS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = args.output.absolute()
    mount = folder / "disk"
    mount.mkdir(parents=True, exist_ok=True)
    import tlcm_jax.main  # noqa: F401  (all imports before the first fork)
    from tlcm_jax.config import run  # noqa: F401

    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", mount]).returncode:
        raise SystemExit(f"cannot mount a tmpfs at {mount}: run this as root")
    try:
        toy_family.register()
        if not (folder / "prompts.txt").exists():
            write_world("toy", folder)
        recipe = folder / "recipe.py"
        config = {**whole_recipe(folder), "sample_every": STEPS // 2}
        recipe.write_text(
            "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
            f"    return ConfigDict({config!r})\n"
        )
        if not (folder / "whole.json").exists():
            shutil.rmtree(folder / "whole", ignore_errors=True)
            _, status = os.waitpid(command(folder / "whole", recipe, folder / "attempt.log"), 0)
            if status:
                raise SystemExit((folder / "attempt.log").read_text()[-3000:])
            (folder / "whole.json").write_text(json.dumps(result(folder / "whole")))
        wanted = json.loads((folder / "whole.json").read_text())
        rng, full = random.Random(args.seed), 0
        # One run is filled at every event in turn, and then brought to its end.
        for event in [*args.events.split(","), "end"]:
            said = "x"
            if event != "end":
                many = rng.randint(1, 3) if event in ("row", "saving", "named") else 1
                said = attempt(event, mount, recipe, rng, many)
                full += bool(said)
                print(
                    f"{event}: {said or 'the command ended before the disk was full'}", flush=True
                )
            if not said or event == "end":
                if said:
                    _, status = os.waitpid(
                        command(mount / "run", recipe, folder / "attempt.log"), 0
                    )
                    if status:
                        raise SystemExit((folder / "attempt.log").read_text()[-3000:])
                found = result(mount / "run")
                for name, value in found.items():
                    if value != wanted[name]:
                        raise SystemExit(f"{name} differ from the undisturbed run's")
                shutil.rmtree(mount / "run")
        print(f"{full} times full, each one line, nothing half written, the end bit-equal")
    finally:
        subprocess.run(["umount", mount])


if __name__ == "__main__":
    main()
