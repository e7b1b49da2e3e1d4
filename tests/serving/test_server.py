"""The local page: what it draws, what it refuses, and that it works in a browser."""

import base64
import http.client
import io
import json
import re
import shutil
import subprocess
import threading

import numpy as np
import pytest
from absl import flags
from PIL import Image

from tests.support.tiny_pipeline import random_adapter, write_tiny_pipeline
from tlcm_jax import serve
from tlcm_jax.families.load import load_model
from tlcm_jax.generation.generate import generate, generate_teacher
from tlcm_jax.io.lora_export import write_lora
from tlcm_jax.models import lora
from tlcm_jax.serving.server import HOST, Server

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A teacher and a LoRA of its student's."""
    import jax

    folder = tmp_path_factory.mktemp("m")
    model = load_model(write_tiny_pipeline(folder / "tiny"))
    fresh = lora.init(model.params["unet"], ("to_q", "to_v"), 2, jax.random.key(0))
    adapter = random_adapter(fresh, np.random.default_rng(0), 0.3)
    path = folder / "student.safetensors"
    write_lora(path, adapter, model.lora_names, dtype="fp32", metadata={})
    return model, adapter, path


@pytest.fixture(scope="module")
def server(student):
    model, _, path = student
    values = flags.FlagValues()
    serve.define_flags(values)
    values(["serve", "--model", model.source, "--lora", str(path), "--port=0"])
    with serve.make_server(values) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(server, content, method="POST", path="/draw", **headers):
    connection = http.client.HTTPConnection(HOST, server.server_port, timeout=300)
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    headers = {"Content-Type": "application/json", **headers}
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    found = answer.read()
    connection.close()
    return answer.status, found


def picture(content):
    found = json.loads(content)
    png = base64.b64decode(found["image"].removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(png))).astype(int), found["said"]


def encoded(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_it_draws_what_the_library_draws(server, student):
    model, adapter, _ = student
    status, content = ask(server, {"prompt": "a cat", "steps": 1, "seed": 5})
    drawn, said = picture(content)
    assert status == 200 and said == "1 step"
    assert np.max(np.abs(drawn - generate(model, ["a cat"], 1, 5, adapter)[0])) <= 1
    drawn, said = picture(ask(server, {"prompt": "a cat", "seed": 5, "teacher": True})[1])
    expected = generate_teacher(model, ["a cat"], 25, 8.0, 5)[0]
    assert said == "teacher, 25 steps, guidance 8" and np.max(np.abs(drawn - expected)) <= 1


def test_it_draws_on_a_picture(server):
    image = encoded(np.full((16, 32, 3), 200, np.uint8))
    mask = encoded(np.full((16, 32), 255, np.uint8))
    request = {"prompt": "a cat", "steps": 1, "picture": image, "mask": mask, "strength": 0.5}
    drawn, said = picture(ask(server, request)[1])
    assert drawn.shape == (32, 32, 3)
    assert said.startswith("strength 0.5 is 1 step, at 499; 32x16 pixels scaled to 64x32")


@pytest.mark.parametrize(
    ("content", "status", "said"),
    [
        ({}, 400, "the prompt is missing"),
        ([], 400, "a request is an object"),
        (b"{", 400, "this is no JSON"),
        (b"[" * 100000, 400, "this is no JSON"),
        ({"prompt": "a", "stepz": 1}, 400, "unknown field 'stepz'"),
        ({"prompt": 3}, 400, "prompt = 3: of the wrong type"),
        ({"prompt": "a", "steps": True}, 400, "steps = True: of the wrong type"),
        ({"prompt": "a", "steps": 9}, 400, "steps = 9: give 1 to 8"),
        ({"prompt": "a", "seed": -1}, 400, "seed = -1"),
        ({"prompt": "a" * 3000}, 400, "3000 characters, over 2000"),
        ({"prompt": "a", "mask": "AAAA"}, 400, "a mask goes with a picture"),
        ({"prompt": "a", "picture": "AAAA"}, 400, "the picture cannot be read as a picture"),
        ({"prompt": "a", "picture": "!"}, 400, "the picture is no base64"),
        ({"prompt": "a", "picture": "AAAA", "strength": 2}, 400, "strength = 2"),
        ({"prompt": "a", "picture": "AAAA", "teacher": True}, 400, "take the picture away"),
    ],
)
def test_a_wrong_request_is_one_line(server, content, status, said):
    found, answer = ask(server, content)
    error = json.loads(answer)["error"]
    assert found == status and said in error and "\n" not in error


def test_it_is_for_this_machine_and_of_limited_size(server, student):
    assert server.server_address[0] == "127.0.0.1"
    assert ask(server, {"prompt": "a"}, Host="evil.example")[0] == 403
    assert ask(server, b"", "GET", "/", Host="evil.example")[0] == 403
    assert ask(server, {"prompt": "a"}, **{"Content-Type": "text/plain"})[0] == 415
    assert ask(server, b"", "GET", "/../../etc/passwd")[0] == 404
    assert ask(server, {"prompt": "a"}, path="/other")[0] == 404
    with Server(server.studio, 0, most_bytes=100) as small:
        threading.Thread(target=small.serve_forever, daemon=True).start()
        status, content = ask(small, {"prompt": "a" * 200})
        small.shutdown()
    assert status == 413 and "over 100" in json.loads(content)["error"]


def test_the_page_holds_nothing_of_elsewhere(server):
    status, page = ask(server, b"", "GET", "/")
    assert status == 200 and b"default-src 'none'" in page
    assert not re.search(rb"(src|href)=.?https?:", page)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on PATH")
def test_a_picture_follows_the_typing(server, tmp_path, monkeypatch):
    """In headless Chromium: two prompts typed at once are two pictures, the last one's shown."""
    typing = """
    addEventListener("load", async () => {
      const wait = (done) => new Promise(ok => {
        const timer = setInterval(() => { if (done()) { clearInterval(timer); ok(); } }, 50);
      });
      $("steps").value = 1;
      for (const text of ["a c", "a ca", "a cat"]) {
        $("prompt").value = text;
        $("prompt").dispatchEvent(new Event("input"));
      }
      await wait(() => !busy && $("student-image").naturalWidth);
      document.documentElement.dataset.probe = JSON.stringify({
        width: $("student-image").naturalWidth, said: $("student-said").textContent,
        error: $("error").textContent, image: $("student-image").src,
      });
    });
    </script>"""
    head, _, tail = server.page.rpartition("</script>")
    monkeypatch.setattr(server, "page", head + typing + tail)
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            *("--enable-logging=stderr", f"--user-data-dir={tmp_path}/home"),
            *("--virtual-time-budget=60000", "--dump-dom", server.url),
        ],
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not re.findall(r"CONSOLE[^\n]*", done.stderr)
    found = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert found, "the probe did not finish"
    seen = json.loads(found[1].replace("&quot;", '"'))
    assert seen["width"] == 32 and seen["error"] == "" and seen["said"].startswith("1 step, ")
    drawn, _ = picture(json.dumps({"image": seen["image"], "said": ""}))
    expected, _ = picture(ask(server, {"prompt": "a cat", "steps": 1})[1])
    np.testing.assert_array_equal(drawn, expected)
