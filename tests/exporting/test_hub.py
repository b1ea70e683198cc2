"""Pushes to a hub of our own: the export and its card, in one commit, and nothing else; the token in one header."""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import constants

from maedistill.exporting.hub import push
from tests.exporting.hub_server import TOKEN, Hub, Repository, hub_server
from tests.exporting.imitation import START, imitate, random_vit

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub's PUT
NAME = "alice/small-vit"
COMMAND = "maedistill finetune x.yaml 'data.train=/home/al smith/a.tar' init.source=run:/home/al/mae run=../../bob/x"
OF_A_MACHINE = {
    "classes": ["a", "b", "c"],
    "init": "run:/home/al smith/mae step_000000007  32 x 2, 0.1 M  license cc-by-nc-4.0",
    "teacher": "local-dir:~carol/teacher  32 x 2; file:///home/al smith/t.pth  0.1 M",
    "starts": [START | {"command": COMMAND}],
}
SECRETS = ("al smith", "/home", "bob", "carol", "secret-host", TOKEN)


@pytest.fixture(scope="module")
def pushed(launcher, shards, tmp_path_factory) -> SimpleNamespace:
    """A run of a machine's paths, pushed by a process of its own with graph and scorecards."""
    home = tmp_path_factory.mktemp("home")
    run = imitate(home / "al smith/run", random_vit(num_classes=3, global_pool="avg"), "finetune", **OF_A_MACHINE)
    settings = run / "config.yaml"
    settings.write_text(settings.read_text().replace("a.tar", '"/home/al smith/data/train-*.tar"'))
    with hub_server() as hub:
        words = ["tools/export.py", run, "--format", "timm,onnx", "--val", shards, "--push-to-hub", NAME]
        setting = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": 1, "HF_TOKEN": TOKEN, "HF_HOME": home / "hf"}
        ended = launcher.start(run, words, by="bare", **setting).finish(0)
        yield SimpleNamespace(hub=hub, run=run, home=home, out=ended.out, err=ended.err)


@pytest.fixture
def tool(monkeypatch, run_command) -> Callable[..., SimpleNamespace]:
    """`maedistill export` in this process, for a hub: its exit code and what it printed."""

    def start(hub: Hub, *arguments: Any) -> SimpleNamespace:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        return run_command("export", *arguments)

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return start


def test_a_push_is_the_export_with_its_card_in_one_commit(pushed):
    repository, out = pushed.hub.repos[NAME], pushed.run / "export"
    assert repository.private and len(repository.commits) == 1
    local = {path.name: path.read_bytes() for path in out.iterdir()}
    assert local.keys() >= {"model.safetensors", "model.onnx", "scorecard_timm.json", "scorecard_onnx.json"}
    card = repository.files["README.md"].decode()
    assert card == local["README.md"].decode().replace("local-dir:THIS_FOLDER", f"hf-hub:{NAME}") and NAME in card
    assert repository.files == local | {"README.md": card.encode(), ".gitattributes": b"*.onnx lfs"}
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "cc-by-nc-4.0" and "forbids commercial use" in card
    assert f"pushed   {pushed.hub.url}/{NAME} (private)" in pushed.out


def test_the_token_is_in_one_header_of_requests_to_the_hub_and_nowhere_else(pushed):
    puts = [request for request in pushed.hub.requests if request.method == "PUT"]
    others = [request for request in pushed.hub.requests if request.method != "PUT"]
    assert len(puts) == 2 and len(others) >= 6
    assert not [request.path for request in puts if "authorization" in request.headers]
    told = [request.headers.pop("authorization") for request in others if "authorization" in request.headers]
    assert set(told) == {f"Bearer {TOKEN}"} and len(told) >= 6
    for request in pushed.hub.requests:
        assert TOKEN not in f"{request.path} {request.headers}" and TOKEN.encode() not in request.body
    assert TOKEN not in pushed.out + pushed.err
    assert not [path for path in pushed.home.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_nothing_that_is_pushed_names_a_folder_or_a_machine(pushed):
    files = pushed.hub.repos[NAME].files
    for name, data in files.items():
        found = [secret for secret in (*SECRETS, str(pushed.home)) if secret.encode() in data]
        assert not found, (name, found)
    card = files["README.md"].decode()
    command = "`maedistill finetune x.yaml data.train=PATH init.source=run:PATH run=PATH`"
    for part in ("Start: run:PATH, 32 x 2, 0.1 M, license cc-by-nc-4.0.", "Training shards: `PATH`", command):
        assert part in card, part
    scorecard = json.loads(files["scorecard_onnx.json"])
    assert (scorecard["model"], scorecard["vs"]) == ("run onnx", "run") and scorecard["processor"]


def test_a_second_push_leaves_nothing_of_the_first(tool, tmp_path):
    run = imitate(tmp_path / "run", random_vit(), license="mit")
    with hub_server() as hub:
        hub.repos[NAME] = repository = Repository(private=True)
        old = dict.fromkeys(("model_int8.onnx", "scorecard_onnx.json", "export.json", "model.safetensors"), b"old")
        repository.files |= old | {"README.md": b"---\nlicense: cc-by-nc-4.0\n---\n"}
        ended = tool(hub, run, "--push-to-hub", NAME)
        assert ended.code == 0, ended.err
    assert len(repository.commits) == 1, "so that nobody ever sees half of it"
    assert repository.files.keys() == {path.name for path in (run / "export").iterdir()} | {".gitattributes"}
    assert b"old" not in repository.files.values() and b"license: mit" in repository.files["README.md"]


@pytest.mark.parametrize(
    ("changed", "name", "cause"),
    [
        ({"license": ""}, NAME, "not stated (empty)"),
        ({"license": "mit", "origin": {"stage": "pretrain", "license": "CC BY-NC 4.0"}}, NAME, "derive from weights"),
        ({}, "small-vit", "has no user name"),
        ({}, "alice/small--vit", "Cannot have --"),
    ],
)
def test_what_may_not_be_pushed_is_refused_before_anything_is_written_or_sent(tool, tmp_path, changed, name, cause):
    run = imitate(tmp_path / "run", random_vit(), **changed)
    with hub_server() as hub:
        ended = tool(hub, run, "--push-to-hub", name)
    error, fix = ended.err.splitlines()
    assert ended.code == 2 and cause in error and fix.startswith("  fix: ")
    assert not hub.requests and not (run / "export").exists()


@pytest.mark.parametrize("words", [["--val"], ["--format", "onyx"], ["--exit", "1"], ["--ema", "--out", "."]])
def test_no_repository_is_made_for_an_export_that_cannot_be(tool, tmp_path, shards, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    run = imitate(tmp_path / "run", random_vit(), license="mit")
    with hub_server() as hub:
        ended = tool(hub, run, "--push-to-hub", NAME, *words, *([shards] if words == ["--val"] else []))
    assert ended.code == 2 and not hub.requests and not hub.repos


@pytest.mark.parametrize("held", [".gitignore", "notes/a.md", "model.safetensors", "READ ONLY", "MOVED"])
def test_a_repository_that_is_not_for_us_is_refused_before_the_work(tool, tmp_path, held):
    run = imitate(tmp_path / "run", random_vit())
    with hub_server() as hub:
        hub.repos[NAME] = repository = Repository(private=True)
        if held == "MOVED":
            hub.repos["alice/new"], hub.moved = hub.repos.pop(NAME), {NAME: "alice/new"}
        elif held == "READ ONLY":
            hub.read_only = True
        else:
            ours = {} if held == "model.safetensors" else {"export.json": b"{}"}
            repository.files |= ours | {"README.md": b"", held: b"theirs"}
        before = dict(repository.files)
        ended = tool(hub, run, "--push-to-hub", NAME)
    cause = {"MOVED": "alice/new", "READ ONLY": "403"}.get(held, f"than an export ({held})")
    assert cause in ended.err and ended.code == (3 if held == "READ ONLY" else 2)
    assert repository.files == before and not repository.commits and not (run / "export").exists()


def test_only_files_of_an_export_are_pushed(tool, tmp_path, monkeypatch):
    run = imitate(tmp_path / "run", random_vit())
    with hub_server() as hub:
        assert tool(hub, run, "--push-to-hub", NAME).code == 0
        (tmp_path / "secret").write_text("secret")
        (run / "export/notes.txt").write_text("mine")
        (run / "export/config.json").unlink()
        (run / "export/config.json").symlink_to(tmp_path / "secret")
        (run / "export/model.pt2").mkdir()
        push(run / "export", NAME)
    files = hub.repos[NAME].files
    assert files.keys() == {".gitattributes", "README.md", "export.json", "model.safetensors"}


def test_a_repository_is_public_if_asked_for_and_stays_what_it_is(tool, tmp_path):
    run = imitate(tmp_path / "run", random_vit())
    with hub_server() as hub:
        assert tool(hub, run, "--push-to-hub", NAME, "--public").code == 0 and not hub.repos[NAME].private
        ended = tool(hub, run, "--push-to-hub", NAME)
    assert ended.code == 2 and "is public already" in ended.err and len(hub.repos[NAME].commits) == 1


def test_a_hub_that_refuses_or_is_gone_is_an_error_without_the_token(tool, tmp_path):
    run = imitate(tmp_path / "run", random_vit())
    with hub_server() as hub:
        hub.refuses = 403
        ended = tool(hub, run, "--push-to-hub", NAME)
    error, fix = ended.err.splitlines()
    assert ended.code == 3 and "403" in error and "the token may write there" in fix and TOKEN not in ended.err
    assert tool(hub, run, "--push-to-hub", NAME).code == 3, "nobody is there any more"


def test_options_without_a_repository_are_refused(tool, tmp_path):
    run = imitate(tmp_path / "run", random_vit())
    with hub_server() as hub:
        assert tool(hub, run, "--public").code == 2
        ended = tool(hub, run, "--push-to-hub", "")  # a variable of the shell that is not set
    assert ended.code == 2 and "--push-to-hub" in ended.err and not hub.requests


def test_a_push_without_a_token_is_refused(tool, tmp_path, monkeypatch):
    run = imitate(tmp_path / "run", random_vit())
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with hub_server() as hub:
        ended = tool(hub, run, "--push-to-hub", NAME)
    assert ended.code == 2 and "no token" in ended.err
