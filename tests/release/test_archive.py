"""The bundle as others receive it: the zip that MONAI downloads, the folder that the Hugging Face Hub keeps."""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.request
import zipfile
from pathlib import Path

import huggingface_hub
import monai.bundle.scripts as monai_bundle
import pytest
import safetensors.torch
import torch
from conftest import ROOT, free_port, run_bundle, serving

from scripts.release.archive import relinked, write_archive, write_hub_folder
from scripts.running.errors import BundleError

NAME, VERSION = "brain_mri_ddpm_3d", json.loads((ROOT / "configs/metadata.json").read_text())["version"]
CONTENTS = json.loads((ROOT / "configs/export.json").read_text())["contents"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """The bundle, in a folder of another name, with all that a release must not hold beside it."""
    folder = tmp_path_factory.mktemp("copy") / "work"
    for part in ("configs", "scripts", "docs", "models"):
        shutil.copytree(ROOT / part, folder / part)
    for file in ("README.md", "LICENSE", "requirements.txt", "requirements-page.txt"):
        shutil.copy(ROOT / file, folder)
    for litter in (
        "data/sub-01.nii.gz", "output/samples/a.nii.gz", "models/checkpoint_00000004.pt", "models/previous_1/model.pt",
        "models/model.pt.partial", "scripts/diffusion/__pycache__/sampler.cpython-313.pyc", "tests/test.py",
        "eval/schema.json", ".git/config", ".venv/bin/python", "mlruns/1", "docs/.DS_Store", "configs/.hidden.swp",
    ):  # fmt: skip
        (folder / litter).parent.mkdir(parents=True, exist_ok=True)
        (folder / litter).write_text("litter")
    return folder


@pytest.fixture(scope="module")
def archive(bundle) -> Path:
    done = run_bundle("run", "archive", cwd=bundle, config_file="configs/export.json")
    assert done.returncode == 0, done.stderr
    path = bundle / f"output/release/{NAME}_v{VERSION}.zip"
    assert hashlib.sha256(path.read_bytes()).hexdigest() in done.stdout
    return path


@pytest.fixture(scope="module")
def hub_folder(bundle) -> Path:
    done = run_bundle("run", "huggingface", cwd=bundle, config_file="configs/export.json")
    assert done.returncode == 0, done.stderr
    return bundle / "output/release/huggingface"


def wanted_files() -> set[str]:
    """Everything of the repository that a bundle is made of, told apart by what it must not be."""
    parts = [p for part in ("configs", "scripts", "docs") for p in (ROOT / part).rglob("*") if p.is_file()]
    kept = {p.relative_to(ROOT).as_posix() for p in parts if "__pycache__" not in p.parts and p.name[0] != "."}
    top = {"README.md", "LICENSE", "requirements.txt", "requirements-page.txt"}
    return kept | top | {"models/model.pt", "models/model.json"}


def test_the_archive_holds_the_bundle_and_nothing_else(archive):
    with zipfile.ZipFile(archive) as file:
        names = file.namelist()
        assert names == sorted(names) and set(names) == {f"{NAME}/{path}" for path in wanted_files()}
        assert all(file.read(f"{NAME}/{path}") == (ROOT / path).read_bytes() for path in wanted_files())
    assert sorted(path.name for path in archive.parent.glob("*.*")) == [archive.name]  # nothing half written


def test_the_same_bundle_gives_the_same_bytes_elsewhere_and_later(archive, bundle, tmp_path):
    other = shutil.copytree(bundle, tmp_path / "other", ignore=shutil.ignore_patterns("output"))
    for path in other.rglob("*.json"):
        os.utime(path, (10**9, 10**9))
        path.chmod(0o600)
    write_archive(str(other), CONTENTS, NAME, str(tmp_path / "a.zip"))
    assert (tmp_path / "a.zip").read_bytes() == archive.read_bytes()


def assert_released(found: dict[str, torch.Tensor], told: bool = True) -> None:
    """The tensors are those of model.pt; a network that is told nothing has none of the class embedding's."""
    weights = torch.load(ROOT / "models/model.pt", weights_only=True)
    weights = {name: t for name, t in weights.items() if told or not name.startswith("class_embedding.")}
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name].to(found[name].dtype)) for name in weights)


def test_monai_downloads_and_loads_the_archive(archive, tmp_path, monkeypatch):
    asked = []

    def from_the_disk(url, filepath, **_):
        asked.append(url)
        shutil.copy(archive, filepath)

    monkeypatch.setattr(monai_bundle, "download_url", from_the_disk)
    monkeypatch.chdir(tmp_path)
    source = {"source": "github", "repo": "owner/repo/tag", "version": VERSION}
    assert_released(monai_bundle.load(NAME, bundle_dir=str(tmp_path), device="cpu", **source).state_dict(), told=False)
    assert asked == [f"https://github.com/owner/repo/releases/download/tag/{archive.name}"]
    assert json.loads((tmp_path / NAME / "configs/metadata.json").read_text())["version"] == VERSION


def test_a_release_that_would_lack_something_is_refused(bundle, tmp_path):
    with pytest.raises(BundleError, match=r"contents: 'models/\*.ts' matches no file"):
        write_archive(str(bundle), [*CONTENTS, "models/*.ts"], NAME, str(tmp_path / "a.zip"))
    assert not list(tmp_path.iterdir())


def test_the_hub_folder_is_the_bundle_with_a_model_card_and_safetensors(hub_folder):
    files = {p.relative_to(hub_folder).as_posix() for p in hub_folder.rglob("*") if p.is_file()}
    assert files == wanted_files() | {"models/model.safetensors", "docs/usage.md"}
    assert_released(safetensors.torch.load_file(hub_folder / "models/model.safetensors"))


def test_the_model_card_is_read_by_the_hub_and_its_links_lead_somewhere(hub_folder):
    card = huggingface_hub.ModelCard.load(hub_folder / "README.md")
    assert (card.data.license, card.data.library_name) == ("cc-by-sa-4.0", "monai")
    assert card.data.pipeline_tag == "unconditional-image-generation" and "monai" in card.data.tags
    assert card.text.strip().startswith("# Model Overview")
    pages = [hub_folder / "README.md", *hub_folder.glob("docs/*.md")]
    for page in pages:
        text = page.read_text()
        assert page.parent.name != "docs" or "](../README.md" not in text
        links = [part.split(")")[0] for part in text.split("](")[1:]]
        local = [link.split("#")[0] for link in links if "://" not in link and link[0] != "#"]
        assert all(page.parent.joinpath(link).exists() for link in local), page
    assert "](docs/data_license.txt)" in pages[0].read_text()


def test_the_space_is_the_bundle_and_opens_its_page(hub_folder):
    space = hub_folder.parent / "space"
    files = {p.relative_to(space).as_posix() for p in space.rglob("*") if p.is_file()}
    assert files == wanted_files() | {"app.py"}
    card = huggingface_hub.RepoCard.load(space / "README.md", repo_type="space")
    assert (card.data.sdk, card.data.app_file) == ("gradio", "app.py")
    needed = [line for line in (space / "requirements.txt").read_text().splitlines() if line[0] != "#"]
    assert all(line.count("==") == 1 for line in needed) and f"gradio=={card.data.sdk_version}" in needed
    port = free_port()
    app = f"import monai.bundle as b; from functools import partial; b.run = partial(b.run, port={port})"
    with serving([sys.executable, "-W", "ignore", "-c", f"{app}; exec(open('app.py').read())"], port, space) as page:
        assert "Synthetic brain MRI" in urllib.request.urlopen(page.url).read().decode()


def test_links_move_with_their_page():
    text = "![a](a.png) [b](../b.md#part) [c](https://c.org/d.md) [e](#e)"
    there = "![a](docs/a.png) [b](b.md#part) [c](https://c.org/d.md) [e](#e)"
    assert relinked(text, "docs/x.md", "x.md") == there and relinked(there, "x.md", "docs/x.md") == text


def test_an_earlier_hub_folder_is_not_mixed_with_a_new_one(bundle, tmp_path):
    (tmp_path / "stale").write_text("")
    with pytest.raises(BundleError, match="is there already"):
        write_hub_folder(str(bundle), ["README.md", "docs/*.md"], {}, str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["stale"]


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as a download asks for: one repository, one commit, one tag."""

    folder: Path
    commit = "1" * 40
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.path.split("?")[0]
        api, resolve = f"/api/models/owner/{NAME}", f"/owner/{NAME}/resolve/{self.commit}/"
        if path == f"{api}/refs":
            tag = {"name": VERSION, "ref": f"refs/tags/{VERSION}", "targetCommit": self.commit}
            self.answer(json.dumps({"branches": [], "converts": [], "tags": [tag]}).encode())
        elif path == f"{api}/revision/{VERSION}":
            self.answer(json.dumps({"id": f"owner/{NAME}", "sha": self.commit, "siblings": []}).encode())
        elif path == f"{api}/tree/{self.commit}":
            files = [p for p in sorted(self.folder.rglob("*")) if p.is_file()]
            entries = [
                {
                    "type": "file",
                    "path": p.relative_to(self.folder).as_posix(),
                    "size": p.stat().st_size,
                    "oid": etag(p),
                }
                for p in files
            ]
            self.answer(json.dumps(entries).encode())
        elif path.startswith(resolve) and (file := self.folder / path.removeprefix(resolve)).is_file():
            self.answer(file.read_bytes(), etag(file))
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def answer(self, content: bytes, tag: str = "none"):
        self.send_response(200)
        for key, value in {"ETag": f'"{tag}"', "X-Repo-Commit": self.commit, "Content-Length": len(content)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


FROM_A_HUB = f"""
import sys, torch
from monai.bundle import download, load
download("{NAME}", bundle_dir=".", source="huggingface_hub", repo="owner/{NAME}")
sys.path.insert(0, "{NAME}")
torch.save(load("{NAME}", bundle_dir=".", device="cpu").state_dict(), "loaded.pt")
"""


def test_monai_downloads_and_loads_from_a_hub(hub_folder, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("ThisHub", (Hub,), {"folder": hub_folder}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    env = dict(os.environ, HF_ENDPOINT=address, HF_HOME=str(tmp_path / "home"), NO_PROXY="127.0.0.1")
    command = [sys.executable, "-W", "ignore", "-c", FROM_A_HUB]
    try:
        done = subprocess.run(command, env=env, text=True, capture_output=True, cwd=tmp_path, timeout=300)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    found = {p.relative_to(tmp_path / NAME).as_posix() for p in (tmp_path / NAME).rglob("*") if p.is_file()}
    files = {p.relative_to(hub_folder).as_posix() for p in hub_folder.rglob("*") if p.is_file()}
    assert {path for path in found if not path.startswith(".cache/") and "__pycache__" not in path} == files
    assert all((tmp_path / NAME / path).read_bytes() == (hub_folder / path).read_bytes() for path in files)
    assert_released(torch.load(tmp_path / "loaded.pt", weights_only=True), told=False)
