"""A fake gcloud for launch/tpu_slice.sh, whose workers are this machine's own bash.

It logs its argument list, answers by a plan, and runs the `--command` of an ssh in a home folder
per worker, so that what the workers would do is executed and not only compared as text.
"""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "tpu_slice.sh"
SLICE = ["--name", "slice-1", "--zone", "us-west4-a", "--project", "my-project"]
WHERE = ["--zone=us-west4-a", "--project=my-project"]
QUEUE = ["compute", "tpus", "queued-resources"]
VM = ["compute", "tpus", "tpu-vm"]
FAST = ["--retry-delay", "0", "--poll", "0"]

FAKE_GCLOUD = """#!{python}
import json, os, pathlib, shutil, subprocess, sys
here = pathlib.Path({home!r})
arguments = sys.argv[1:]
with open(here / "calls.jsonl", "a") as log:
    log.write(json.dumps(arguments) + "\\n")
plan = json.loads((here / "plan.json").read_text())
verb = arguments[3]
answers = plan.get(verb, [])
answer = answers.pop(0) if answers else {{}}
(here / "plan.json").write_text(json.dumps(plan))
print(answer.get("out", ""), end="")
print(answer.get("err", ""), end="", file=sys.stderr)
if "status" in answer:
    sys.exit(answer["status"])
options = dict(a.split("=", 1) for a in arguments if a.startswith("--") and "=" in a)
workers = [0, 1] if options.get("--worker") == "all" else [int(options.get("--worker", 0))]
status = 0
for worker in workers:
    home = here / f"worker{{worker}}"
    home.mkdir(exist_ok=True)
    if verb == "scp":
        shutil.copy(arguments[4], home / arguments[5].split(":", 1)[1])
    if verb == "ssh":
        environment = dict(os.environ, HOME=str(home))
        done = subprocess.run(["bash", "-c", options["--command"]], cwd=home, env=environment)
        status = status or done.returncode
sys.exit(status)
"""


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


class Cloud:
    """A fake gcloud, and a git clone of the launch folder with one committed config."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "plan.json").write_text("{}")
        gcloud = FAKE_GCLOUD.format(python=sys.executable, home=str(folder))
        write_program(folder / "bin" / "gcloud", gcloud)
        self.clone = folder / "clone dir"
        (self.clone / "configs").mkdir(parents=True)
        (self.clone / "configs" / "it's.py").write_text("")
        (self.clone / "launch").mkdir()
        for script in (SCRIPT, SCRIPT.with_name("command_line.sh")):
            shutil.copy(script, self.clone / "launch")
        git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.com"]
        for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
            subprocess.run([*git, *command], cwd=self.clone, check=True)

    def plan(self, **answers):
        (self.folder / "plan.json").write_text(json.dumps(answers))

    def calls(self) -> list[list[str]]:
        log = self.folder / "calls.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def verbs(self) -> list[str]:
        return [call[3] for call in self.calls()]

    def __call__(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        search = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            ["bash", str(self.clone / "launch" / "tpu_slice.sh"), *arguments],
            env=dict(os.environ, PATH=search),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            **options,
        )


def state(name: str, accelerator: str = "v5litepod-16") -> dict:
    return {"out": f"{name}\t{accelerator}\n"}


ABSENT = {"status": 1, "err": "ERROR: NOT_FOUND: Resource was not found"}
