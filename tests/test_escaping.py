"""Words from outside: whatever they hold, they stay one line of text, and no secret is printed or kept."""

import csv
import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from maedistill import cli
from maedistill.commands import pretrain
from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.data.remote.urls import check_url
from maedistill.data.shards.layout import REPORT_FILE
from maedistill.data.shards.open_index import open_index
from maedistill.data.shards.patterns import find_shards
from maedistill.data.shards.sources import open_folder
from maedistill.data.shards.summary import print_summary
from maedistill.data.shards.write import make_shards
from maedistill.errors import DataError, PeerError, exit_code_of, leave
from maedistill.escaping import cell, code, has_secret, markdown, masked, say, shown, warn, without_paths
from maedistill.evaluation.context import EvalContext
from maedistill.evaluation.scorecard import ScoreSpec, score
from maedistill.exporting.folder import export
from maedistill.processes.diagnosis import Diagnosis, Heartbeat, failure_of
from maedistill.report.formatting import markdown_table
from maedistill.report.run_report import write_finetune_report, write_run_report
from maedistill.runs.folder import RunFolder
from maedistill.runs.progress import BadSampleLog, Progress
from maedistill.runs.provenance import describe_start
from maedistill.runs.train_log import TrainLog
from maedistill.study.results_page import unfinished_lines
from maedistill.study.status import StatusLine
from tests.data.shards.test_folders import PNG, fill
from tests.data.tar_files import write_tar
from tests.exporting.imitation import RECORDS, START, imitate, random_vit
from tests.support.launch import ROOT

MARKUP = "|<script>`=cmd()"
WORD = f"\x1b[2J\nerror: fake\r\u202e\u2028\x9b{MARKUP}"
SECRET = "hunter/2@x"
ADDRESSES = [f"{scheme}://user:{SECRET}@host/a.tar" for scheme in ("hf", "s3", "gs", "https", "http", "ftp")]
ADDRESSES += [f"https://{SECRET[:6]}@host/a.tar", f"hf://datasets/u/n/a.tar?token={SECRET}", f"gs://b/a?sig={SECRET}"]
ADDRESSES += [f"s3://b/a.tar?X-Amz-Expires=9&X-Amz-Signature={SECRET}", f"https://h/a?v=1&api_key={SECRET}"]
ADDRESSES += [f"https://{SECRET[:6] * 50}@host/a.tar"]  # an error quotes only its beginning
LOGIN = f"user:{SECRET[:6]}"
OTHERS = [f"https:/u:{SECRET}@h/t.tar", f"s3:///u:{SECRET}@h/t.tar", f"https:/{SECRET[:6]}@h/t.tar"]
OTHERS += [f"hf://datasets/{LOGIN}@a/b/t.tar", f"//{LOGIN}@h/x.tar", f"{LOGIN}@h:/x", f"./out:/a/{LOGIN}@b"]
OTHERS += [f"https://u%3A{SECRET[:6]}%40h/t.tar", f"https:u%3a{SECRET[:6]}@h/t.tar", f"hf-hub:u:{SECRET}@x/y"]
OTHERS += [
    f"hf-hub:{LOGIN}@x/y",
    f"hf://{LOGIN}%40h/t.tar",
    f"{SECRET[:6]}:u:x:{SECRET[:6]}@h",
    f"a:u%3A{SECRET[:6]}%40x",
]
OTHERS += [f"pipe:curl -H 'Authorization: {kind} {SECRET}' https://h/t" for kind in ("Bearer", "Basic", "")]
OTHERS += [f"pipe:curl -H Bearer {SECRET}", f'pipe:curl -H "X-Api-Key: {SECRET}" https://h/t', f"Basic {SECRET}A="]
TOKEN = "hf_" + "abcDEF123" * 4


def check(text: str, *, holds: str = MARKUP) -> str:
    """Fail unless the text shows the word, as text within a line."""
    assert holds in text, text
    assert all(line.isprintable() and not line.startswith("error: fake") for line in text.split("\n")), ascii(text)
    return text


def check_page(text: str) -> str:
    """Fail if the word is markup on a page of Markdown. In code it stands as it is."""
    check(text, holds="=cmd()")
    prose = re.sub(r"(`+).*?(?<!`)\1(?!`)|^    .*$", "", text, flags=re.M)
    assert "&#60;script>" in prose and "<script" not in prose and "`" not in re.sub("^```.*", "", prose, flags=re.M)
    return text


def test_no_character_steers_a_terminal():
    for char in map(
        chr, (*range(32), *range(127, 160), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
    ):
        assert shown(f"a{char}b") == f"a{ascii(char)[1:-1]}b" and shown(shown(char)) == shown(char)


def test_what_is_plain_stays_as_it_is():
    plain = "Größe 3 × 4 µm, 日本語, vit_small_patch16_224.mae, C:\\x ± 0.1 %"
    assert shown(plain) == plain and markdown("vit_small_patch16_224 (32 x 2)") == "vit_small_patch16_224 (32 x 2)"
    assert code("a b") == "`a b`" and code("a`b``c") == "``` a`b``c ```"
    assert [cell(value) for value in ("ant", "-1", "+1.5e-3", "", -3, "=1", "@x", "+a", "-1+2")] == [
        "ant", "-1", "+1.5e-3", "", -3, "'=1", "'@x", "'+a", "'-1+2"
    ]  # fmt: skip
    row = markdown_table(["a", "b"], [[WORD, "*x* [y](z)"]])[2]
    assert row.count("|") == 3 and "*" not in row and "[" not in row and "<" not in row


def test_console_log_and_errors(tmp_path, capsys, monkeypatch):
    log = TrainLog(tmp_path / "train.log")
    with pytest.raises(DataError), log.capture():
        log.begin(f"=== {WORD}")
        say(f"teacher  {WORD}", "next")
        StatusLine(sys.stdout).print(f"FAILED {WORD}", WORD)
        warn(f"{WORD} is odd")
        raise DataError(WORD, WORD)
    with pytest.raises(KeyError), log.capture():
        raise KeyError("a") from ValueError(WORD)
    check(log.path.read_text())
    printed = capsys.readouterr()
    check(printed.out)
    check(printed.err)
    assert "warning: " in log.path.read_text()

    def lose(error):
        raise error

    beat = Heartbeat(rank=1, host=WORD, process=1)
    failed = Diagnosis.from_text(failure_of(beat, OSError(WORD)).to_text()).error
    assert isinstance(failed, PeerError) and exit_code_of(lambda: lose(failed)) == 5
    monkeypatch.setattr("os._exit", lambda code: None)
    leave(lambda: lose(RuntimeError(f"size mismatch:\n{WORD}")))
    leave(lambda: sys.exit(WORD))
    error = check(capsys.readouterr().err.replace("\nerror: fake", "", 1))  # sys.exit's own text has lines
    assert "\n  size mismatch" not in error and "\n  \\x1b[2J" in error
    config = load_config({"method": "mae"}, root=PretrainConfig, to_run=False).config
    samples = BadSampleLog(tmp_path / "bad.txt", config)
    samples.add([WORD])
    samples.count(Progress())
    check((tmp_path / "bad.txt").read_text())


def test_data(tmp_path, capsys):
    """Shards whose classes, keys and names are such words; what is made of them, printed and written."""
    files = [f"{split}/{name}/{WORD}{i}.png" for split in ("train", "val") for name in (WORD, "=1+1") for i in (0, 1)]
    pictures = fill(fill(tmp_path / "pictures", files), {f"train/{WORD}/{WORD}.png": b"\x89PNG\r\n\x1a\n, and no more"})
    source, made = open_folder(pictures), tmp_path / "shards"
    print_summary(made, make_shards(source, made), source.notes)
    for file in ("classes.json", REPORT_FILE):
        check((made / file).read_text())
    shard = tmp_path / f"=2\u202e{MARKUP}.tar"
    write_tar(
        shard,
        [
            (f"=3{WORD}{i}.{end}", data)
            for i in "012"
            for end, data in (("png", PNG), ("cls", str(int(i) % 2).encode()))
        ],
    )
    (made / "classes.json").rename(tmp_path / "classes.json")
    index = open_index(str(shard))
    assert set(index.classes) == {WORD, "=1+1"} and index.key(0) == f"=3{WORD}0"  # exact, for whoever looks it up

    vit = random_vit(num_classes=2, global_pool="avg")
    run = imitate(tmp_path / "run", vit, "finetune", classes=list(index.classes), license=WORD)
    files = {name: tmp_path / f"{name}.csv" for name in ("predictions", "per_class")} | {"json": tmp_path / "s.json"}
    context = EvalContext(torch.device("cpu"), 4, workers=0)
    score(ScoreSpec(str(run), str(shard), latency=False), context, files=files)
    check(capsys.readouterr().out)
    check(files["json"].read_text())
    for name in ("predictions", "per_class"):
        cells = [value for row in csv.reader(check(files[name].read_text()).splitlines()) for value in row]
        assert "'=1+1" in cells and not any(value.startswith("=") for value in cells)
        assert name == "per_class" or f"'=2\\u202e{MARKUP}.tar" in cells
    with pytest.raises(DataError) as raised:
        replace(index, labels=index.labels - 1).require_labels()  # a label is gone
    check(str(raised.value))


def test_pages(tmp_path):
    """The license, teacher, classes, start, command and folder of a run on its card and report."""
    start = START | {"command": f"maedistill pretrain '{WORD}'"}
    changed = {"license": WORD, "teacher": f"timm:{WORD}  32 x 2", "init": WORD, "starts": [start]}
    step = {"step": 7, "epoch": 2.5, "loss": 1.0, "images_per_second": 1.0, "trained_seconds": 1.0}
    for stage, write in (("pretrain", write_run_report), ("finetune", write_finetune_report)):
        vit = random_vit(num_classes=3, global_pool="avg") if stage == "finetune" else random_vit()
        run = imitate(tmp_path / stage / MARKUP, vit, stage, **changed)
        records = [step, *RECORDS["finetune"]] if stage == "finetune" else [step]
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        check_page(write(RunFolder(run)).read_text())
        out = export(run, tmp_path / stage / "out")
        card = check_page((out / "README.md").read_text())
        front = yaml.safe_load(card.split("---\n")[1])
        assert front["license"] == "other" and re.fullmatch("[a-z0-9.-]+", front["license_name"])
        for file in ("config.json", "export.json"):
            check((out / file).read_text())
    unfinished = [{"run": "a", "epochs": 1.0, "ended": WORD}]
    check_page("\n".join(unfinished_lines(unfinished)))


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_secret_in_an_address_is_refused_and_appears_nowhere(address, tmp_path, capsys, monkeypatch):
    run, log = tmp_path / "run", TrainLog(tmp_path / "train.log")
    file = f"extends: {ROOT}/configs/own/mae.yaml\nrun: {run}\ndata: {{train: '{address}'}}\n"
    (tmp_path / "own.yaml").write_text(file)
    given = [f"{key}={address}" for key in ("data.train", "data.index", "init.source")]
    given += [f"teacher.source=file:{address}", f"data.val=['{address}']"]
    words = [[str(tmp_path / "own.yaml")], *(["own/mae", f"run={run}", word] for word in given)]
    with log.capture():
        log.begin(f"at {address}")
        for arguments in words:
            monkeypatch.setattr("sys.argv", ["maedistill", "pretrain", *arguments])
            assert exit_code_of(pretrain.main) == 2
        for refuse in (check_url, find_shards, open_index):
            assert exit_code_of(lambda: refuse(address)) == 2  # noqa: B023
        say(address)
        warn(f"{address} does not answer")
    assert exit_code_of(lambda: load_config({"data": {"train": masked(address)}}, root=PretrainConfig)) == 2
    printed = capsys.readouterr()
    kept = [path.read_text() for path in tmp_path.rglob("*") if path.is_file() and path.name != "own.yaml"]
    texts = [printed.out, printed.err, *kept, json.dumps(describe_start({})), markdown(address), code(address)]
    assert not run.exists() and "***" in printed.err
    assert not [text for text in texts if SECRET[:6] in text]


@pytest.mark.parametrize("address", OTHERS)
def test_a_secret_of_any_other_form_is_refused(address, tmp_path, capsys, monkeypatch):
    assert has_secret(address) and has_secret(f"in {address}, and") and SECRET[:6] not in masked(f"in {address}, and")
    assert exit_code_of(lambda: load_config({"data": {"train": [address]}}, root=PretrainConfig)) == 2
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", before := ["maedistill"])
    for words in (["export", "run", "--out", address], ["shards", address, "o"], ["--version", address], [address]):
        assert exit_code_of(lambda: cli._dispatch(words)) == 2  # noqa: B023
    assert SECRET[:6] not in "".join(capsys.readouterr()) and sys.argv is before
    assert not any(tmp_path.iterdir())


def test_an_address_is_no_place_for_files(tmp_path, capsys, monkeypatch):
    """Path() made a folder `s3:` of it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_bytes(PNG)
    run = imitate(tmp_path / "run", random_vit(), "pretrain")
    calls = [
        lambda: export(run, "s3://b/o"),
        lambda: make_shards(open_folder(tmp_path / "photos"), Path("s3://b/o")),
        lambda: load_config("own/mae", ["data.train=a.tar", "run=s3://b/o"], root=PretrainConfig),
        lambda: cli._dispatch(["evaluate", "run", "a.tar", "--json", "gs://b/o.json"]),
        lambda: cli._dispatch(["benchmark", "loader", "a.tar", "--json", "gs://b/o.json"]),
        lambda: cli._dispatch(["study", "quickstart/study", "--out", "s3://b/o", "--report"]),
        lambda: cli._dispatch(["quickstart", "--out", "s3://b/o"]),
    ]
    for call in calls:
        monkeypatch.setattr("sys.argv", ["maedistill"])
        assert exit_code_of(call) == 2
        assert re.search("(s3|gs):/+b/o.* is an address", capsys.readouterr().err)
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "run"}


def test_addresses_without_secrets_stay_and_bare_tokens_go():
    plain = ["hf://datasets/u/n@main/a.tar", "hf://gpt2@main/a.tar", "http://h:8080/a@b", "tcp://[::1]:29500"]
    plain += ["timm:vit_base_patch16_224.augreg_in1k", "run:runs/a@b", "hf-hub:org/name", "hf-hub:org/name@revision"]
    plain += ["hf-hub:name@v1", "file:/a/b@2x.pth", "file:a@2x.pth", "C:\\runs\\a@b", "distill.kd=1 a@b.org"]
    plain += ["at 12:30@noon, 12:30:00@x", "runs/a:b/c@2x.jpg", '{"a":"b@c"}', "tests/a.py::test@b", "a.tar::b@c"]
    plain += ["data.train: no file a@b.tar", 'File "a@b.py", line 3: x', "host:8080", "git@github.com:org/name"]
    plain += ["Basic blocks, basic VisionTransformer", "hf://gpt2%40main/a.tar", "name@sha256:0a1b", "a:b,c:d e@f"]
    plain += ["at tcp://h:29500)", "s3://b/train-{0..9}.tar", "gs://b/train-?.tar", "a@b.org", "timm:vit.mae"]
    for address in plain:
        assert masked(address) == address and not has_secret(address)
    assert masked("at 's3://KEY:hunt...") == "at 's3://***@"  # a library quotes the beginning
    assert TOKEN not in masked(f"Invalid token {TOKEN}!") and has_secret("hf://***@host/a.tar")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("run:/home/al b/x step_7  32 x 2, img/s", "run:PATH  32 x 2, img/s"),
        ("file:///home/al/t.pth", "file:PATH"),
        ("run://al/x", "run:PATH"),
        ("run:al@host:/home/x  32 x 2", "run:PATH  32 x 2"),
        ("//al/x", "PATH"),
        ("~al/x and y", "PATH"),
        ("local-dir:~/x  run:../x", "local-dir:PATH  run:PATH"),
        ("runs/../../al/x", "PATH"),
        ("{source: /al/x, weight: 1}", "{source: PATH"),
        ("timm:vit.mae  width 1/2, 3 / 4", "timm:vit.mae  width 1/2, 3 / 4"),
        ("https://host/a ~ s3://b/a-{0..9}.tar", "https://host/a ~ s3://b/a-{0..9}.tar"),
        ("shards/in1k/train-*.tar", "shards/in1k/train-*.tar"),
    ],
)
def test_folders_of_a_machine_are_left_out(text, left):
    assert without_paths(text) == left


def test_a_command_keeps_its_words():
    text = "maedistill x 'data.train=/home/al b/c  d.tar' run=runs/a init.source=run:/al/o log.every_steps=1"
    left = "maedistill x data.train=PATH run=runs/a init.source=run:PATH log.every_steps=1"
    assert without_paths(text, command=True) == left
    assert without_paths("x 'run=/home/al b", command=True) == "x 'run=PATH"


def test_a_long_text_costs_no_more_than_its_length():
    """It took a minute: each word may begin a scheme."""
    begin = time.process_time()
    for piece in ("a.", "a:", "a:b ", "hf-hub:a:", "x-", "u%3A", "../", ":~", "=a/"):
        masked(piece * (50_000 // len(piece)))
        without_paths(piece * (50_000 // len(piece)))
    assert time.process_time() - begin < 4


def test_there_is_one_door(root):
    """Whoever prints, logs or writes CSV does so through escaping.py; ruff's T20 sees print."""
    found = {
        (path.name, word)
        for path in (root / "maedistill").rglob("*.py")
        for word in ("getLogger(", "csv.writer(", "print_exc", "format_exception", "sys.stderr.write")
        if word in path.read_text()
    }
    assert found == {("escaping.py", "format_exception"), ("accuracy.py", "csv.writer(")}
