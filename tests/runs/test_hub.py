"""Students on the hub: asked before any work, uploaded after the check, and nothing lost where that fails.

The hub is one of this process, on 127.0.0.1: what its client sends is answered as the hub answers it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants
from huggingface_hub.utils import _http
from runs_helpers import FAST, as_flags, assert_refused, call_cli, copied, finished_run, snapshot, teacher_folder

import onestill
from onestill.core.errors import SettingError
from onestill.runs import hub
from onestill.runs.export import export

TOKEN = "hf_abc"


class Hub:
    """What the fake knows: its user, its repositories, and what it refuses."""

    def __init__(self) -> None:
        self.user: dict[str, Any] = {"name": "me", "orgs": [{"name": "team"}], "type": "user"}
        self.role: dict[str, Any] = {"role": "write"}
        self.repos: dict[str, dict[str, Any]] = {}
        self.asked: list[str] = []
        self.refuses: dict[str, int] = {}
        """The status of the answer to requests whose path has these words; 0 breaks the connection."""
        self.blobs: dict[str, bytes] = {}
        self.endpoint = ""

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Any]:
        self.asked.append(f"{method} {path}")
        for words, status in self.refuses.items():
            if words in path:
                return status, {"error": "as the test wants it"}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials"}
        if path == "/api/whoami-v2":
            return 200, {**self.user, "auth": {"type": "access_token", "accessToken": self.role}}
        if path == "/api/validate-yaml":  # of a card
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.startswith("/lfs/"):
            self.blobs[path.rpartition("/")[2]] = body
            return 200, {}
        name, rest = re.match(r"/(?:api/models/)?([\w.-]+/[\w-]+)(?:\.git)?(.*)", path).groups()  # type: ignore[union-attr]
        return self._of_repo(name, rest, body) if name in self.repos else (404, {"error": "Repository not found"})

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked.get('organization') or self.user['name']}/{asked['name']}"
        is_there = name in self.repos
        self.repos.setdefault(name, {"private": asked.get("visibility") == "private", "files": {".gitattributes": b""}})
        return (409 if is_there else 200), {"url": f"{self.endpoint}/{name}", "error": "You already created this"}

    def _of_repo(self, name: str, rest: str, body: bytes) -> tuple[int, Any]:
        repo = self.repos[name]
        if rest == "":
            files = [{"rfilename": file} for file in repo["files"]]
            return 200, {"id": name, "private": repo["private"], "siblings": files, "sha": "0" * 40}
        if rest.startswith("/auth-check"):
            return 200, {}
        if rest.startswith("/preupload"):
            # As the hub does: what is large by its name goes another way than the rest.
            files = [file["path"] for file in json.loads(body)["files"]]
            mode = lambda file: "lfs" if file.endswith((".safetensors", ".png")) else "regular"  # noqa: E731 - of one line
            return 200, {"files": [{"path": f, "uploadMode": mode(f), "shouldIgnore": False} for f in files]}
        if rest == "/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            href = lambda oid: {"upload": {"href": f"{self.endpoint}/lfs/{oid}", "header": {}}}  # noqa: E731 - of one line
            return 200, {"transfer": "basic", "objects": [{**each, "actions": href(each["oid"])} for each in objects]}
        if rest.startswith("/commit"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    repo["files"][value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    repo["files"][value["path"]] = self.blobs[value["oid"]]
            return 200, {"commitUrl": f"{self.endpoint}/{name}/commit/1", "commitOid": "1" * 40}
        raise AssertionError(rest)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, where the client is logged in."""
    there = Hub()

    class Handler(BaseHTTPRequestHandler):
        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = self.headers.get("Authorization") or f"Bearer {TOKEN}" * self.path.startswith("/lfs/")
            status, said = there.answer(self.command, self.path.partition("?")[0], body, token)
            if status == 0:
                self.connection.close()
                return
            content = json.dumps(said).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_HEAD = handle_one

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    there.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", there.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its storage speaks no HTTP that could be answered here
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    yield there
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of one's own."""
    return copied(finished_run("class"), tmp_path / "run")


def front_of(card: bytes) -> dict[str, Any]:
    return dict(yaml.safe_load(card.decode().split("---\n")[1]))


# What is uploaded


def test_an_export_is_uploaded_with_its_card(fake: Hub, run: Path, tmp_path: Path) -> None:
    done = call_cli("export", run, "--output", tmp_path / "digits-one", "--push_to_hub", "--device", "cpu")
    assert done.code == 0, done.err
    assert f"the student will be uploaded to {fake.endpoint}/me/digits-one" in done.err
    files = fake.repos["me/digits-one"]["files"]
    here = {
        str(path.relative_to(tmp_path / "digits-one")): path.read_bytes()
        for path in (tmp_path / "digits-one").rglob("*")
        if path.is_file()
    }
    assert {name: value for name, value in files.items() if name != ".gitattributes"} == here
    front = front_of(files["README.md"])
    assert front["pipeline_tag"] == "unconditional-image-generation" and "one-step" in front["tags"]
    assert [each["output"]["url"] for each in front["widget"]] == [f"images/{i}.png" for i in range(4)]
    assert [each["text"] for each in front["widget"]][:3] == ["class 0", "class 1", "class 2"]
    assert files["images/0.png"].startswith(b"\x89PNG") and files["images/0.png"] != files["images/1.png"]
    assert not fake.repos["me/digits-one"]["private"]


def test_nothing_is_uploaded_that_is_not_asked_for(fake: Hub, run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out", device="cpu")
    assert fake.asked == [] and not (tmp_path / "out" / "images").exists()


def test_an_evaluation_is_on_the_card(fake: Hub, run: Path, tmp_path: Path) -> None:
    report = {
        "kind": "onestill.Report",
        "protocol": {"teacher": "t", "extractor": "pixels", "feature_dim": 64, "num_images": 100, "reference": "the teacher",
                     "num_reference_images": 100, "seeds": "0..99"},
        "rows": [
            {"name": "teacher", "num_steps": 50, "network_evaluations": 100, "frechet_distance": 1.0},
            {"name": "student, 4 steps", "is_student": True, "num_steps": 4, "network_evaluations": 4, "frechet_distance": 2.0},
            {"name": "student", "is_student": True, "num_steps": 1, "network_evaluations": 1, "frechet_distance": 3.5},
        ],
    }  # fmt: skip
    (run / "evaluation").mkdir()
    (run / "evaluation" / "report.json").write_text(json.dumps(report))
    export(run, tmp_path / "out", device="cpu", push_to_hub=True, hub_model_id="team/digits", hub_private=True)
    card = fake.repos["team/digits"]["files"]["README.md"]
    (index,) = front_of(card)["model-index"]
    assert index["name"] == "digits" and index["results"] == [
        {
            "task": {"type": "unconditional-image-generation"},
            "dataset": {"type": "generated", "name": "100 images, against the teacher"},
            "metrics": [{"type": "frechet_distance", "name": "Fréchet distance (pixels)", "value": 3.5}],
        }
    ]
    assert fake.repos["team/digits"]["private"]
    assert "# One-step student of" in card.decode() and card == (tmp_path / "out" / "README.md").read_bytes()
    # Of another average than the one that was measured it says nothing, whichever of the two has been named.
    export(run, tmp_path / "other", device="cpu", push_to_hub=True, ema_width=0.0)
    assert "model-index" not in front_of(fake.repos["me/other"]["files"]["README.md"])
    report["rows"][2]["name"] = "student, width 0"  # type: ignore[index]
    (run / "evaluation" / "report.json").write_text(json.dumps(report))
    export(run, tmp_path / "usual", device="cpu", push_to_hub=True)
    files = fake.repos["me/usual"]["files"]
    assert "model-index" not in front_of(files["README.md"])
    # Where the teacher lies on this machine is nobody's business.
    place = str(onestill.load_teacher(teacher_folder("class")).folder).encode()
    assert not [name for name, content in files.items() if place in content]


def distilled(folder: Path, **settings: Any) -> Any:
    return onestill.distill(
        teacher_folder(), folder, **{**FAST, "max_train_steps": 1, "lr_warmup_steps": 0, **settings}
    )


def test_a_run_makes_its_repository_before_it_trains(fake: Hub, tmp_path: Path) -> None:
    said: list[str] = []
    seen: list[bool] = []
    result = distilled(
        tmp_path / "my-run", push_to_hub=True, say=said.append, on_step=lambda _: seen.append("me/my-run" in fake.repos)
    )
    assert said[0] == f"the student will be uploaded to {fake.endpoint}/me/my-run" and seen == [True]
    assert result.hub_url == f"{fake.endpoint}/me/my-run" and not result.upload_error
    files = fake.repos["me/my-run"]["files"]
    assert files["onestill.json"] == (tmp_path / "my-run" / "pipeline" / "onestill.json").read_bytes()
    folder = Path(tmp_path / "hub")  # what is there draws, as it is
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    assert onestill.sample(folder, num_images=1, device="cpu").shape == (1, 1, 8, 8)


def test_a_dry_run_asks_and_makes_nothing(fake: Hub, tmp_path: Path) -> None:
    distilled(tmp_path / "my-run", push_to_hub=True, dry_run=True, show_progress=False)
    assert fake.repos == {} and "GET /api/whoami-v2" in fake.asked and snapshot(tmp_path) == {}


# What is refused before any work


def refused(fake: Hub, run: Path, out: Path, *flags: str) -> str:
    outcome = call_cli("export", run, "--output", out, "--push_to_hub", "--device", "cpu", *flags)
    assert_refused(outcome, "--")
    assert not out.exists() and not any("preupload" in asked or "commit" in asked for asked in fake.asked)
    return outcome.words


def test_tokens_that_do_not_do(fake: Hub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    fake.role = {"role": "read"}
    assert "--push_to_hub: the token may read and not write in me; log in with" in refused(fake, run, out)
    fake.role = {"role": "fineGrained", "fineGrained": {"scoped": [{"entity": {"name": "me"}, "permissions": ["repo.content.read"]}]}}  # fmt: skip
    assert "may read and not write" in refused(fake, run, out)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "the hub refuses the token; log in with `hf auth login`" in refused(fake, run, out)
    monkeypatch.setenv("HF_TOKEN", "hf_ä")
    words = refused(fake, run, out)
    assert "the token has a character that no token has" in words and "hf_ä" not in words
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.hf_api, "get_token", lambda: None)
    assert "there is no token for the hub" in refused(fake, run, out)
    assert fake.repos == {}


def test_a_token_of_single_rights_that_may_write(fake: Hub, run: Path, tmp_path: Path) -> None:
    scope = {"entity": {"type": "org", "name": "team"}, "permissions": ["repo.content.read", "repo.write"]}
    fake.role = {"role": "fineGrained", "fineGrained": {"scoped": [scope]}}
    assert export(run, tmp_path / "out", device="cpu", push_to_hub=True, hub_model_id="team/x") <= 1e-4
    assert "onestill.json" in fake.repos["team/x"]["files"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("others/x", "--hub_model_id others/x: the token is of me, who is no member of others; write one of me, team"),
        ("me/a--b", "--hub_model_id me/a--b: "),
        ("me/x/y", "--hub_model_id me/x/y: "),
        ("taken", "--hub_model_id me/taken: holds other files (model.bin, ...), and no student; name another"),
    ],
)
def test_names_that_do_not_do(fake: Hub, run: Path, tmp_path: Path, name: str, words: str) -> None:
    fake.repos["me/taken"] = {"private": False, "files": {".gitattributes": b"", "model.bin": b""}}
    assert words in refused(fake, run, tmp_path / "out", "--hub_model_id", name)
    assert set(fake.repos) == {"me/taken"}


def test_a_folder_whose_name_is_none_of_a_repository(fake: Hub, run: Path, tmp_path: Path) -> None:
    said = refused(fake, run, tmp_path / "out of it")
    assert "--hub_model_id: the folder's name 'out of it' is no name of a repository; give owner/name" in said


def test_a_public_repository_is_not_taken_for_a_private_one(fake: Hub, run: Path, tmp_path: Path) -> None:
    fake.repos["me/out"] = {"private": False, "files": {".gitattributes": b""}}
    assert "--hub_private: me/out is there and public" in refused(fake, run, tmp_path / "out", "--hub_private")


def test_a_repository_that_cannot_be_made(fake: Hub, run: Path, tmp_path: Path) -> None:
    fake.refuses = {"/api/repos/create": 403}
    words = refused(fake, run, tmp_path / "out")
    assert "--hub_model_id me/out: the hub does not let this token write there (403): as the test wants it" in words
    done = call_cli("distill", teacher_folder(), "--output_dir", tmp_path / "r", "--push_to_hub", *as_flags(FAST))
    assert (
        done.code == 2 and "does not let this token write there (403)" in done.words and not (tmp_path / "r").exists()
    )
    fake.refuses = {"auth-check": 403}
    fake.repos["me/out"] = {"private": False, "files": {}}
    assert "does not let this token write there (403)" in refused(fake, run, tmp_path / "out")


def test_a_hub_that_is_not_to_be_asked(fake: Hub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingError, match="push_to_hub=True: local_files_only forbids the network"):
        distilled(tmp_path / "new", push_to_hub=True, local_files_only=True, show_progress=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "--push_to_hub: HF_HUB_OFFLINE forbids the network" in refused(fake, run, tmp_path / "out")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "--push_to_hub: the hub cannot be reached" in refused(fake, run, tmp_path / "out")
    assert fake.asked == [] and not (tmp_path / "new").exists()


def test_settings_that_nothing_reads(fake: Hub, run: Path, tmp_path: Path) -> None:
    for flags in (["--hub_model_id", "me/x"], ["--hub_private"]):
        outcome = call_cli("export", run, "--output", tmp_path / "out", *flags)
        assert_refused(outcome, f"{' '.join(flags)}: says where to upload to; give --push_to_hub too")
    several = call_cli("export", run, "--output", tmp_path / "out", "--push_to_hub", "--format", "diffusers,lora")
    assert_refused(several, "--push_to_hub: uploads one folder with its card; export one --format after the other")
    assert fake.asked == []


# What fails at the end


@pytest.mark.parametrize(
    ("where", "status", "words"),
    [
        ("/lfs/", 413, "takes no files so large, or has no room for them (413)"),
        ("/info/lfs", 507, "has no room left for this account (507)"),
        ("/preupload", 403, "does not let this token write there (403)"),
        ("/commit", 0, "the hub cannot be reached, or the connection broke"),
        ("/lfs/", 0, "the hub cannot be reached, or the connection broke"),
    ],
)
def test_an_upload_that_fails_loses_nothing(
    fake: Hub, run: Path, tmp_path: Path, where: str, status: int, words: str
) -> None:
    fake.refuses = {where: status}
    out = tmp_path / "out"
    done = call_cli("export", run, "--output", out, "--push_to_hub", "--device", "cpu")
    assert done.code == 1 and words in done.words and "Traceback" not in done.err, done.err
    assert done.err.count("\n") == 2, "a line that says where, and one that says why not"
    command = re.search(r"upload it with: (hf upload .*)$", done.err, re.MULTILINE)
    assert command is not None and shlex.split(command[1]) == ["hf", "upload", "me/out", str(out), "."]
    assert onestill.sample(out, num_images=1, device="cpu").shape == (1, 1, 8, 8)
    # What the command does, through the same client.
    fake.refuses = {}
    huggingface_hub.HfApi().upload_folder(repo_id="me/out", folder_path=out, path_in_repo=".")
    assert "onestill.json" in fake.repos["me/out"]["files"]


def test_a_run_whose_upload_fails_ends_with_what_it_made(fake: Hub, tmp_path: Path) -> None:
    fake.refuses = {"/commit": 507}
    run, flags = tmp_path / "my-run", [*as_flags({**FAST, "max_train_steps": 1, "lr_warmup_steps": 0})]
    done = call_cli("distill", teacher_folder(), "--output_dir", run, "--push_to_hub", *flags)
    assert done.code == 1 and "self-check against the student" in done.out
    assert f"hf upload me/my-run {run}/pipeline ." in done.err and "no room left for this account (507)" in done.words
    with pytest.raises(hub.UploadError, match="no room left"):
        distilled(tmp_path / "another", push_to_hub=True, show_progress=False)
    assert (tmp_path / "another" / "pipeline" / "onestill.json").is_file()
    # Gone on with, a finished run uploads what is there and trains nothing.
    fake.refuses, before = {}, snapshot(run / "pipeline")
    again = call_cli("distill", "--config", run / "config.yaml", "--resume_from_checkpoint", "latest")
    assert again.code == 0 and f"uploaded to {fake.endpoint}/me/my-run" in again.out
    assert snapshot(run / "pipeline") == before
    digest = hashlib.sha256(fake.repos["me/my-run"]["files"]["unet/diffusion_pytorch_model.safetensors"]).hexdigest()
    assert digest == before["unet/diffusion_pytorch_model.safetensors"]
    # And without the place, when it is told not to.
    asked = len(fake.asked)
    last = call_cli(
        "distill", "--config", run / "config.yaml", "--resume_from_checkpoint", "latest", "--no_push_to_hub"
    )
    assert last.code == 0 and len(fake.asked) == asked, last.err
