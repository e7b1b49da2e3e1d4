"""launch/tpu_slice.sh keep: a run that goes on until it is finished, against a fake gcloud."""

import shutil

from tests.launch.conftest import FAKE_PYTHON
from tests.support.fake_gcloud import ABSENT, FAST, SLICE, state, write_program

KEEP = [
    "keep",
    *SLICE,
    *FAST,
    *("--accelerator", "v5litepod-16", "--spot", "--watch", "0"),
    *("--config", "configs/it's.py", "--workdir", "gs://bucket/r s"),
]
ACTIVE = [state("ACTIVE")] * 60


def exits(cloud, *codes):
    for worker in range(2):
        home = cloud.folder / f"worker{worker}"
        home.mkdir(exist_ok=True)
        (home / "exits").write_text(" ".join(map(str, codes)))


def starts(done):
    return done.stderr.count("starting the run")


def test_it_starts_waits_and_says_that_it_is_finished(installed):
    installed.plan(describe=ACTIVE)
    done = installed(*KEEP, "--", "--x=a b")
    assert done.returncode == 0, done.stderr
    assert starts(done) == 1
    assert done.stderr.splitlines()[-1].endswith("finished: gs://bucket/r s")
    assert "delete" not in installed.verbs()
    assert '"--x=a b"' in (installed.folder / "worker1" / "arguments.json").read_text()
    # Said again, it finds it finished.
    installed.plan(describe=ACTIVE)
    again = installed(*KEEP, "--delete")
    assert again.returncode == 0 and starts(again) == 0
    assert installed.verbs()[-1] == "delete"


def test_a_run_that_stopped_short_is_resumed(installed):
    exits(installed, 75, 134, 0)
    installed.plan(describe=ACTIVE)
    done = installed(*KEEP)
    assert done.returncode == 0, done.stderr
    assert starts(done) == 3


def test_a_run_that_fails_again_and_again_is_given_up(installed):
    exits(installed, 1, 1, 1, 1)
    installed.plan(describe=ACTIVE)
    done = installed(*KEEP, "--retries", "2")
    assert done.returncode == 1
    assert "the run ended with an error, 3 times" in done.stderr
    assert starts(done) == 3


def test_a_slice_that_was_taken_away_is_made_and_installed_again(installed):
    for worker in range(2):  # new machines
        shutil.rmtree(installed.folder / f"worker{worker}")
    # What uv makes is a python that trains.
    (installed.folder / "trainer").write_text(FAKE_PYTHON)
    write_program(
        installed.folder / "bin" / "python3",
        '#!/bin/sh\nif [ "$3" = venv ]; then mkdir -p ~/tlcm/venv/bin; '
        f'install -m 755 "{installed.folder}/trainer" ~/tlcm/venv/bin/python; fi\n',
    )
    installed.plan(describe=[state("SUSPENDED"), ABSENT, *ACTIVE])
    done = installed(*KEEP)
    assert done.returncode == 0, done.stderr
    assert installed.verbs()[:4] == ["describe", "delete", "describe", "create"]
    assert installed.verbs().count("scp") == 1 and starts(done) == 1


def test_mistakes_are_told_before_anything_is_asked_for(cloud):
    for missing in ("--config", "--workdir", "--accelerator"):
        arguments = list(KEEP)
        place = arguments.index(missing)
        del arguments[place : place + 2]
        done = cloud(*arguments)
        assert done.returncode == 2 and f"{missing} is missing" in done.stderr
    assert cloud.calls() == []
