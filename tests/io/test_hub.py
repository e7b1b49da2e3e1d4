"""Hub ids, through huggingface_hub itself and a hub on the loopback: what is fetched, and offline.

Every test has a cache of its own. A network that is gone is a closed port, a server that answers
errors or a web page, or huggingface_hub's own offline mode.
"""

import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from absl import logging
from huggingface_hub import constants

from tests.support.tiny_pipeline import write_tiny_pipeline
from tlcm_jax.families.load import abstract_model, load_model
from tlcm_jax.io import lora_stack
from tlcm_jax.io.hub import HubId, fetch, needed
from tlcm_jax.io.lora_sources import find_lora
from tlcm_jax.io.model_card import teacher_licence, teacher_name

NAMES = ("unet", "vae", "text_encoder", "tokenizer")
SHA, OLDER = "462165984030d82259a11f4367a4eed129e94a7b", "b" * 40
FAILURES = ("closed", "offline mode", "503", "portal", "hangs up", "no such host", "proxy")


class Hub:
    """A hub of one repository, `someone/tiny`, whose default branch is at `SHA`."""

    def __init__(self, repository):
        self.repository, self.fails, self.fetched = repository, None, []
        self.commits = {"main": SHA, SHA: SHA}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def files(self):
        return sorted(
            path.relative_to(self.repository).as_posix()
            for path in self.repository.rglob("*")
            if path.is_file()
        )

    def answer(self, request):
        path, status, head = request.path.split("?")[0], 200, {}
        if self.fails == "hangs up":
            request.close_connection = True
            request.connection.close()
            return
        revision = path.split("/")[-1] if "/revision/" in path else "main"
        if self.fails == "503":
            status, body = 503, b""
        elif self.fails == "portal":
            body = b"<html>Welcome to our wireless network</html>"
        elif "someone/tiny" not in path or revision not in self.commits:
            status, body = 404, b""
            code = "RepoNotFound" if "someone/tiny" not in path else "RevisionNotFound"
            head["X-Error-Code"] = code
        elif "/resolve/" in path:
            commit, _, name = path.split("/resolve/")[1].partition("/")
            body = (self.repository / name).read_bytes()
            head |= {"ETag": hashlib.sha1(body).hexdigest(), "X-Repo-Commit": commit}
            if request.command == "GET":
                self.fetched.append(name)
        elif "/tree/" in path:
            body = json.dumps([self.entry(name) for name in self.files()]).encode()
        else:
            siblings = [{"rfilename": name} for name in self.files()]
            sha = self.commits[revision]
            body = json.dumps({"id": "someone/tiny", "sha": sha, "siblings": siblings}).encode()
        request.send_response(status)
        for key, value in {**head, "Content-Length": str(len(body))}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)

    def entry(self, name):
        data = (self.repository / name).read_bytes()
        oid = hashlib.sha1(data).hexdigest()
        return {"type": "file", "path": name, "size": len(data), "oid": oid}


@pytest.fixture(scope="module")
def tiny_repository(tmp_path_factory):
    return write_tiny_pipeline(tmp_path_factory.mktemp("hub") / "repository")


@pytest.fixture
def tiny_hub(tiny_repository, tmp_path, monkeypatch):
    repository = shutil.copytree(tiny_repository, tmp_path / "repository")
    for extra in (
        "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin",
        "vae/model.onnx", "sd_xl_base_1.0.safetensors", "text_encoder/flax_model.msgpack",
        "vae_1_0/diffusion_pytorch_model.safetensors", "preview.png",
    ):  # fmt: skip
        (repository / extra).parent.mkdir(exist_ok=True)
        (repository / extra).write_bytes(b"x")
    (repository / "README.md").write_text("---\nlicense: openrail++\n---\n")
    hub = Hub(repository)
    point_at(hub.url, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    yield hub
    hub.close()
    huggingface_hub.close_session()


def point_at(url, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def cut_off(hub, how, monkeypatch):
    """Takes the network away."""
    huggingface_hub.close_session()
    if how == "closed":
        hub.close()
    elif how == "offline mode":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif how == "no such host":
        point_at("http://hub.invalid", monkeypatch)
    elif how == "proxy":
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        monkeypatch.setenv("no_proxy", "")
    else:
        hub.fails = how
    monkeypatch.setattr("time.sleep", lambda _: None)  # between tries


def test_only_what_is_needed_of_one_commit(tiny_hub, tiny_repository):
    pipeline = load_model(f"someone/tiny@{SHA}", on_device=False)
    here = {p.relative_to(tiny_repository).as_posix() for p in tiny_repository.rglob("*.*")}
    folder = Path(pipeline.folder)
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*.*")} == here | {"README.md"}
    assert len(tiny_hub.fetched) == len(set(tiny_hub.fetched)) <= len(here) + 1
    assert pipeline.source == f"someone/tiny@{SHA}" and Path(pipeline.folder).name == SHA
    assert teacher_name(pipeline.source) == "someone/tiny"
    assert teacher_licence(folder) == "openrail++"


def test_shapes_need_no_weights(tiny_hub):
    abstract_model("someone/tiny")
    assert not [name for name in tiny_hub.fetched if name.endswith(".safetensors")]


@pytest.mark.parametrize("how", FAILURES)
def test_what_was_fetched_is_there_without_a_network(tiny_hub, monkeypatch, caplog, how):
    """By name and by commit, whichever it was fetched by."""
    logging.use_absl_handler()
    folder = fetch(HubId("someone/tiny"))
    cut_off(tiny_hub, how, monkeypatch)
    for source in (
        HubId("someone/tiny"),
        HubId("someone/tiny", SHA),
        HubId("someone/tiny", "main"),
    ):
        caplog.clear()
        assert fetch(source) == folder
        (warning,) = [r.getMessage() for r in caplog.records if r.name == "absl"]
        assert warning.startswith("the hub cannot be reached") and SHA in warning


def test_fetched_by_commit_found_by_name(tiny_hub, monkeypatch):
    folder = fetch(HubId("someone/tiny", SHA))
    cut_off(tiny_hub, "closed", monkeypatch)
    assert fetch(HubId("someone/tiny")) == folder
    load_model("someone/tiny", on_device=False)


@pytest.mark.parametrize(
    "break_off",
    ["unet/diffusion_pytorch_model.safetensors", "model_index.json", "tokenizer"],
)
def test_a_fetch_that_was_broken_off_is_said_to_be(tiny_hub, monkeypatch, break_off):
    """And an older whole one is taken in its place, where no commit is asked for."""
    folder = fetch(HubId("someone/tiny"))
    broken = folder / break_off
    shutil.rmtree(broken) if broken.is_dir() else broken.unlink()
    cut_off(tiny_hub, "offline mode", monkeypatch)
    lacks = r"the cache's copy is not whole: no.*(unet|tokenizer|model_index)"
    with pytest.raises(FileNotFoundError, match=lacks):
        fetch(HubId("someone/tiny"))
    if break_off.startswith("unet"):
        fetch(HubId("someone/tiny"), weights=False)
    older = shutil.copytree(tiny_hub.repository, folder.parent / OLDER)
    assert fetch(HubId("someone/tiny")) == older
    with pytest.raises(FileNotFoundError, match="not whole"):
        fetch(HubId("someone/tiny", SHA))


def test_a_repository_that_is_gone_is_still_in_the_cache(tiny_hub, monkeypatch):
    folder = fetch(HubId("someone/tiny"))
    tiny_hub.commits.clear()
    assert fetch(HubId("someone/tiny")) == folder
    with pytest.raises(FileNotFoundError, match="no such repository of revision 'v9'"):
        fetch(HubId("someone/tiny", "v9"))


def test_loras_by_hub_id(tiny_hub, monkeypatch, tmp_path):
    (tiny_hub.repository / "model_index.json").rename(tmp_path / "model_index.json")
    for name in ("style.safetensors", "sub/other.safetensors", "pickled.bin"):
        (tiny_hub.repository / name).parent.mkdir(exist_ok=True)
        (tiny_hub.repository / name).write_bytes(name.encode())
    (tiny_hub.repository / "sd_xl_base_1.0.safetensors").unlink()
    file, config = find_lora("someone/tiny")
    assert file.read_bytes() == b"style.safetensors" and config is None
    assert find_lora("someone/tiny@main:sub/other.safetensors")[0].name == "other.safetensors"
    assert lora_stack.split_weight("someone/tiny:sub/other.safetensors:0.5") == (
        "someone/tiny:sub/other.safetensors", 0.5,
    )  # fmt: skip
    assert len(tiny_hub.fetched) == 2
    for wrong, message in (
        ("someone/tiny:none.safetensors", "no such file there; it has style.safetensors"),
        ("someone/tiny:../../x", "no such file there"),
        ("someone/typo", "the hub has no such repository"),
        ("style.safetensors", "does not exist; give a safetensors file, a folder or a hub id"),
        ("a/style.safetensors", "does not exist"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            find_lora(wrong)
    with pytest.raises(ValueError, match="pickled.bin is a pickle"):
        find_lora("someone/tiny:pickled.bin")
    (tiny_hub.repository / "second.safetensors").write_bytes(b"second")
    tiny_hub.commits = dict.fromkeys(("main", OLDER), OLDER)
    with pytest.raises(FileNotFoundError, match="several; name one, someone/tiny:FILE, of .*sec"):
        find_lora("someone/tiny")
    cut_off(tiny_hub, "closed", monkeypatch)
    again, _ = find_lora(f"someone/tiny@{SHA}:style.safetensors")
    assert again.read_bytes() == b"style.safetensors"


@pytest.mark.parametrize("how", FAILURES)
def test_what_was_never_fetched(tiny_hub, monkeypatch, how):
    cut_off(tiny_hub, how, monkeypatch)
    for name in ("someone/tiny", f"someone/tiny@{SHA}"):
        with pytest.raises(FileNotFoundError, match=r"cannot be reached \(.*it is not in the c"):
            load_model(name)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("someone/typo", "'someone/typo' is no folder or file here, and the hub has no such"),
        ("someone/tiny@v9", r"no such repository of revision 'v9' \(404 Client Error"),
    ],
)
def test_what_the_hub_does_not_have(tiny_hub, path, message):
    with pytest.raises(FileNotFoundError, match=message):
        load_model(path)


def test_ids_and_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert HubId.parse("a-b/c_d.1") == HubId("a-b/c_d.1")
    assert HubId.parse("a/b@refs/pr/3") == HubId("a/b", "refs/pr/3")
    for text in ("a", "/a/b", "a/b/c", "./a", "../b", "a/", "https://hub/a/b", "a/b@"):
        assert HubId.parse(text) is None, text
    Path("runs/emoji").mkdir(parents=True)
    assert HubId.parse("runs/emoji") is None and HubId.parse("runs/emojy") is not None


def test_one_set_of_weights_a_network():
    files = [
        "model_index.json", "unet/config.json", "tokenizer/vocab.json", "tokenizer/merges.txt",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
        "unet/diffusion_pytorch_model.fp16-00001-of-00001.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.bin",
        "text_encoder/model.safetensors", "text_encoder/model.fp16.safetensors",
    ]  # fmt: skip
    plain = needed(files, NAMES)
    assert [name for name in plain if name.endswith(".safetensors")] == [
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",  # there is no other
        "text_encoder/model.safetensors",
    ]
    assert [
        name for name in needed(files, NAMES, variant="fp16") if name.endswith(".safetensors")
    ] == [
        "unet/diffusion_pytorch_model.fp16-00001-of-00001.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model.fp16.safetensors",
    ]
    assert needed(files, NAMES, weights=False) == files[:4]
