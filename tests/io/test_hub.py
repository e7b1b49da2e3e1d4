"""Hub ids, against a hub that is a folder: what is fetched, of which version, and what is said."""

import shutil
import types
from fnmatch import fnmatch
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from tlcm_jax.families.load import abstract_model, load_model
from tlcm_jax.io import hub
from tlcm_jax.io.hub import HubId, needed
from tlcm_jax.io.model_card import teacher_licence, teacher_name

NAMES = ("unet", "vae", "text_encoder", "tokenizer")
SHA = "462165984030d82259a11f4367a4eed129e94a7b"


class Hub:
    """A hub with one repository; counts what is fetched."""

    def __init__(self, repository, cache):
        self.repository, self.cache = repository, cache
        self.up, self.fetched, self.revisions = True, [], []

    def model_info(self, name, revision=None):
        if not self.up:
            raise OSError("Name or service not known")
        if name != "someone/tiny" or revision not in (None, "main", SHA):
            response = types.SimpleNamespace(headers={}, request=None, status_code=404)
            raise RepositoryNotFoundError("404 Client Error.\nmore", response=response)
        files = [p.relative_to(self.repository) for p in self.repository.rglob("*") if p.is_file()]
        siblings = [types.SimpleNamespace(rfilename=path.as_posix()) for path in files]
        return types.SimpleNamespace(siblings=siblings, sha=SHA)

    def snapshot_download(self, name, revision=None, allow_patterns=None, local_files_only=False):
        if local_files_only:
            if not self.fetched:
                raise LocalEntryNotFoundError("not in the cache")
            return str(self.cache)
        self.revisions.append(revision)
        for path in sorted(self.repository.rglob("*")):
            part = path.relative_to(self.repository).as_posix()
            if path.is_file() and any(fnmatch(part, pattern) for pattern in allow_patterns):
                self.fetched.append(part)
                (self.cache / part).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, self.cache / part)
        return str(self.cache)


@pytest.fixture
def tiny_hub(tiny, tmp_path, monkeypatch):
    repository = shutil.copytree(tiny, tmp_path / "repository")
    for extra in (
        "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin",
        "vae/model.onnx", "sd_xl_base_1.0.safetensors", "text_encoder/flax_model.msgpack",
        "vae_1_0/diffusion_pytorch_model.safetensors", "preview.png",
    ):  # fmt: skip
        (repository / extra).parent.mkdir(exist_ok=True)
        (repository / extra).write_bytes(b"")
    (repository / "README.md").write_text("---\nlicense: openrail++\n---\n")
    fake = Hub(repository, tmp_path / "cache")
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    monkeypatch.setattr(hub, "snapshot_download", fake.snapshot_download)
    return fake


def test_only_what_is_needed_of_one_commit(tiny_hub, tiny):
    pipeline = load_model(f"someone/tiny@{SHA}", on_device=False)
    assert tiny_hub.revisions == [SHA] * 2  # the index, and what it names
    here = {p.relative_to(tiny).as_posix() for p in Path(tiny).rglob("*") if p.is_file()}
    assert set(tiny_hub.fetched) == here | {"README.md"}
    assert pipeline.source == f"someone/tiny@{SHA}" and pipeline.folder == str(tiny_hub.cache)
    assert teacher_name(pipeline.source) == "someone/tiny"
    assert teacher_licence(Path(pipeline.folder)) == "openrail++"
    tiny_hub.up = False  # now from the cache
    load_model("someone/tiny", on_device=False)
    assert tiny_hub.revisions == [SHA] * 2


def test_shapes_need_no_weights(tiny_hub):
    abstract_model("someone/tiny")
    assert not [name for name in tiny_hub.fetched if name.endswith(".safetensors")]


@pytest.mark.parametrize(
    ("path", "up", "message"),
    [
        ("someone/typo", True, "'someone/typo' is no folder or file here, and the hub has no such"),
        ("someone/tiny@v9", True, r"no such repository of revision 'v9' \(404 Client Error.\)"),
        ("someone/tiny", False, r"the hub cannot be reached \(Name or service not known\)"),
    ],
)
def test_what_cannot_be_had(tiny_hub, path, up, message):
    tiny_hub.up = up
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
