import sys

import pytest

from tests.support.fake_gcloud import Cloud, write_program

# Ends with the next status that `exits` names.
FAKE_PYTHON = f"""#!{sys.executable}
import json, os, pathlib, sys, time
home = pathlib.Path.home()
(home / "arguments.json").write_text(json.dumps(sys.argv[1:]))
print("training", flush=True)
time.sleep(float(os.environ.get("FAKE_TRAINING_SECONDS", "0")))
exits = home / "exits"
first, *rest = exits.read_text().split() if exits.exists() else ["0"]
exits.write_text(" ".join(rest or ["0"]))
sys.exit(int(first))
"""


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


@pytest.fixture
def installed(cloud):
    """Two workers on which setup is done; their python and gcsfuse record their arguments."""
    write_program(cloud.folder / "bin" / "sudo", "#!/bin/sh\n")
    write_program(cloud.folder / "bin" / "mountpoint", "#!/bin/sh\nexit ${MOUNTED:-1}\n")
    write_program(cloud.folder / "bin" / "gcsfuse", '#!/bin/sh\necho "$@" >> ~/mounted.txt\n')
    for worker in range(2):
        home = cloud.folder / f"worker{worker}"
        write_program(home / "tlcm" / "venv" / "bin" / "python", FAKE_PYTHON)
        (home / "tlcm" / "source").mkdir()
    return cloud
