"""What files of strangers may do: attacks, each of which has to end in one line and leave no trace."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from training import PLAIN, write

from kdkit import recipe
from kdkit.contracts.inputs import TextShape
from kdkit.errors import KdkitError
from kdkit.runs import checks

SUPERVISED = {"teacher": None, "schedule": {"use": "supervised"}, "losses": [{"use": "cross_entropy"}]}


class Trap:
    """Python that leaves a mark where it runs."""

    def __init__(self, folder):
        self.mark = folder / "it-ran"
        self.code = f"open({str(self.mark)!r}, 'w').close()\n"

    def write(self, file, more=""):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(self.code + more)
        return file

    @property
    def sprung(self):
        return self.mark.exists()


@pytest.fixture
def trap(tmp_path):
    return Trap(tmp_path)


def refused(path, *says, overrides=None):
    """`kdkit check` ends in one line that says so."""
    with pytest.raises(KdkitError) as caught:
        checks.make(recipe.load(path, overrides))
    assert "\n" not in str(caught.value)
    for part in says:
        assert part in str(caught.value)
    return str(caught.value)


# What tells a library how to load a network


LOADER = [
    ("hf/bert", "config", {"trust_remote_code": True}),
    ("hf/bert", "config", {"code_revision": "main"}),
    ("hf/bert", "config", {"auto_map": {"AutoConfig": "evil.Config"}}),
    ("hf/bert", "config", {"attn_implementation": "owner/kernel"}),
    ("resnet18", "args", {"checkpoint_path": "weights.pth"}),
    ("resnet18", "args", {"pretrained_cfg": {"file": "weights.pth"}}),
    ("resnet18", "args", {"pretrained_cfg_overlay": {"url": "http://127.0.0.1:9/weights.pth"}}),
    ("resnet18", "args", {"pretrained_cfg_overlay": {"hf_hub_id": "owner/name"}}),
    ("resnet18", "args", {"cache_dir": "elsewhere"}),
    ("resnet18", "args", {"num_classes": 7}),
    ("torchvision/resnet18", "args", {"weights": "IMAGENET1K_V1"}),
    ("torchvision/resnet18", "args", {"progress": True}),
]


@pytest.mark.parametrize(
    ("model", "key", "arguments"), LOADER, ids=[f"{m.partition('/')[0]}-{next(iter(a))}-{i}" for i, (m, _, a) in enumerate(LOADER)]
)
def test_keywords_of_a_loader_are_no_configuration(tmp_path, model, key, arguments):
    file = write(tmp_path, {**PLAIN, **SUPERVISED, "student": {"model": model, key: arguments}})
    refused(file, f"{file.name}:", f"student.{key}: ", next(iter(arguments)))


def network_folder(folder, trap, **config):
    """A folder of transformers with Python of its own."""
    name = config["model_type"]
    trap.write(folder / "evil.py", "from transformers import BertConfig as Config, BertForSequenceClassification as Network\n")
    places = {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Network", "AutoTokenizer": ["evil.Network", None]}
    (folder / "config.json").write_text(json.dumps({"architectures": ["Network"], "auto_map": places, **config, "model_type": name}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": places, "tokenizer_class": "EvilTokenizer"}))
    return folder


NARROW = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 60, "num_hidden_layers": 1}


@pytest.mark.parametrize("kind", ["bert", "evil", "whisper"])
@pytest.mark.parametrize("pretrained", [False, True])
def test_a_folder_with_python_of_its_own_runs_nothing(tmp_path, trap, kind, pretrained):
    pytest.importorskip("transformers")
    from kdkit.models.build import build_model
    from kdkit.recipe import registry

    folder = network_folder(tmp_path / "net", trap, model_type=kind, attn_implementation="owner/kernel", **NARROW)
    source = registry.load().models["hf"]
    options = source.Options(model=f"hf/{folder}", pretrained=pretrained)
    try:
        module = build_model(options, source(options, str(folder)), 3, TextShape((8,))).module
    except KdkitError as error:
        assert "\n" not in str(error)
        assert kind != "bert" or pretrained  # its weights are not there
    else:
        assert type(module).__module__.startswith("transformers.") and not hasattr(module.config, "auto_map")
    assert not trap.sprung


def test_a_tokenizer_with_python_of_its_own_runs_nothing(tmp_path, trap):
    pytest.importorskip("transformers")
    from kdkit_plugins.datasets._text.tokens import TextOptions, tokenized

    folder = network_folder(tmp_path / "net", trap, model_type="evil")
    with pytest.raises(KdkitError) as caught:
        tokenized(TextOptions(tokenizer=str(folder)), ["a text"], [0])
    assert "\n" not in str(caught.value) and not trap.sprung


def test_files_that_are_pickles_are_no_dataset(tmp_path):
    data = {"dataset": {"use": "hf_dataset", "dataset": "pandas", "tokenizer": "./t", "files": {"train": "a.pkl", "test": "a.pkl"}}}
    file = write(tmp_path, {**PLAIN, **SUPERVISED, "data": data})
    refused(file, "'pandas' is no kind of files that is read here; allowed: csv, json, parquet, text")


def test_a_community_s_dataset_is_refused(tmp_path):
    file = write(tmp_path, {**PLAIN, **SUPERVISED, "data": {"dataset": {"use": "timm", "dataset": "tfds/owner:name"}}})
    refused(file, "data.dataset.dataset: ")


def pickled(trap):
    """A pickle whose reading runs Python."""
    import pickle

    class Evil:
        def __reduce__(self):
            return exec, (trap.code,)

    return pickle.dumps({"model": Evil()}, protocol=2)


def test_pickles_that_are_not_what_they_should_be(tmp_path, trap):
    """torchvision reads CIFAR's files as pickles, once their digests are right."""
    from kdkit_plugins.datasets.torchvision import Cifar10, Cifar100

    for source, folder, names in (
        (Cifar10, "cifar-10-batches-py", ["batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6))]),
        (Cifar100, "cifar-100-python", ["meta", "train", "test"]),
    ):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_bytes(pickled(trap))
        with pytest.raises(KdkitError, match="cannot be read"):
            source(source.Options(root=tmp_path)).split("train")
    assert not trap.sprung


# Checkpoints


def nested(depth):
    inner = {"w": torch.zeros(1)}
    for _ in range(depth):
        inner = {"model": inner}
    return inner


def endless():
    found = {}
    found["model"] = found
    return found


def tangled():
    found = {}
    found.update({str(i): found for i in range(2000)})
    return found


@pytest.mark.parametrize(
    "content", [endless(), tangled(), nested(40), {"w": torch.zeros(1).to_sparse()}, [1], {}],
    ids=["holds itself", "holds itself often", "deep", "sparse", "list", "empty"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
def test_a_checkpoint_that_is_none(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    file = write(tmp_path, student={"checkpoint": "w.pth"})
    refused(file, "student.checkpoint: ", "w.pth: holds no weights")


def test_a_checkpoint_that_is_compressed(tmp_path):
    import zipfile

    torch.save({"w": torch.zeros(1000)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "w.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    refused(write(tmp_path, student={"checkpoint": "w.pth"}), "w.pth: is a compressed archive")


def test_a_checkpoint_of_shapes_alone_is_told_when_it_is_read(tmp_path):
    from kdkit.models.weight_files import read_weights

    torch.save({"w": torch.zeros(1, device="meta")}, tmp_path / "w.pth")
    with pytest.raises(KdkitError, match="w.pth: holds no weights"):
        read_weights(tmp_path / "w.pth")


def test_a_checkpoint_that_would_run_python(tmp_path, trap):
    (tmp_path / "w.pth").write_bytes(pickled(trap))
    refused(write(tmp_path, student={"checkpoint": "w.pth"}), "w.pth: no checkpoint", "code in a file is never run")
    assert not trap.sprung


# What a check may fetch: nothing


@pytest.fixture
def server():
    """An address at which every connection is taken down."""
    import socket
    import threading

    with socket.create_server(("127.0.0.1", 0)) as listening:
        asked = []

        def listen():
            while True:
                try:
                    taken, _ = listening.accept()
                except OSError:
                    return
                asked.append(taken.recv(1000))
                taken.close()

        threading.Thread(target=listen, daemon=True).start()
        yield SimpleNamespace(port=listening.getsockname()[1], asked=asked)
        listening.shutdown(socket.SHUT_RDWR)


PLUGIN = """
import urllib.request
import kdkit

class Remote(kdkit.DatasetSource):
    "Asks a server for its facts, and makes a folder."

    name = "remote"

    def info(self):
        try:
            urllib.request.urlopen("http://127.0.0.1:{port}/facts", timeout=5)
        except OSError as error:
            raise kdkit.DataError(f"cannot be asked: {{error}}") from error
        return kdkit.DataInfo((1, 8, 8), 6, 48, 20)

    def split(self, part):
        raise NotImplementedError

@kdkit.hookimpl
def kdkit_datasets():
    return [Remote]
"""


def test_a_check_connects_to_nothing(tmp_path, server):
    (tmp_path / "remote.py").write_text(PLUGIN.format(port=server.port))
    file = write(tmp_path, {**PLAIN, "plugins": ["remote.py"], "data": {"dataset": {"use": "remote"}, "batch_size": 8}})
    refused(file, "a check connects to no other machine>; a check fetches nothing, `kdkit train` does")
    assert not server.asked
    with pytest.raises(KdkitError):  # the same when it is to be trained, and may be fetched
        checks.make(recipe.load(file), print)
    assert server.asked


@pytest.mark.parametrize(
    "student", [{"model": "hf-hub:owner/absent"}, {"model": "hf/owner/absent"}], ids=["timm", "transformers"]
)  # fmt: skip
def test_a_check_asks_no_hub(tmp_path, student, monkeypatch):
    from huggingface_hub import constants

    asked = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: asked.append(1))
    data = {} if student["model"].startswith("hf-") else {"data": {"dataset": {"use": "clinc150", "download": True, "tokenizer": "./t"}}}
    file = write(tmp_path, {**PLAIN, **SUPERVISED, **data, "student": student})
    monkeypatch.chdir(tmp_path)
    refused(file, "student.model: ", "a check fetches nothing, `kdkit train` does")
    assert not asked and constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize("student", [{"model": "resnet18.a1_in1k"}, {"model": "torchvision/resnet18"}], ids=["timm", "torchvision"])
def test_a_check_needs_no_pretrained_weights(tmp_path, student, monkeypatch):
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("a connection was wanted"))
    data = {"data": {**PLAIN["data"], "dataset": {**PLAIN["data"]["dataset"], "image_size": 32}}}
    file = write(tmp_path, {**PLAIN, **SUPERVISED, **data, "student": {**student, "pretrained": True}})
    assert checks.make(recipe.load(file)).student.parameters > 10**6


@pytest.mark.parametrize(
    ("root", "place", "allowed"),
    [
        ("insects", None, True),
        ("deep/insects", None, True),
        ("../elsewhere/new", None, False),
        ("../elsewhere/new", "../elsewhere", True),
        (".config/autostart", None, False),
        ("../recipes/../elsewhere/new", None, False),
        ("link/new", None, False),
    ],
)  # fmt: skip
def test_where_files_are_fetched_to(tmp_path, root, place, allowed, monkeypatch):
    from kdkit.recipe.fetching import refuse_elsewhere

    for name in ("recipes", "here", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "recipes" / "link").symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("KDKIT_DATA", raising=False)
    if place:
        monkeypatch.setenv("KDKIT_DATA", str(tmp_path / "recipes" / place))
    dataset = {"use": "image_folder", "root": root, "url": "http://127.0.0.1:9/x.zip", "download": True}
    loaded = recipe.load(write(tmp_path / "recipes", {**PLAIN, **SUPERVISED, "data": {"dataset": dataset, "image_size": 8}}))
    folder = loaded.spec.data.dataset.root
    if allowed:
        refuse_elsewhere(loaded, folder)
    else:
        refused(loaded.source.path, f"would be fetched to {folder}, ", f"KDKIT_DATA={folder} in the environment allows it")
    refuse_elsewhere(loaded, tmp_path / "here" / "data")


# Python that recipes and runs name


LOSS = """
import kdkit

class Own(kdkit.Loss):
    "Nothing new."

    name = "own"
    knowledge = "labels"

    def forward(self, student, teacher, batch):
        return student.logits.square().mean()

@kdkit.hookimpl
def kdkit_losses():
    return [Own]
"""
NETWORK = """
from torch import nn

def Net(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
"""
SMALL = {"epochs": 1, "optimizer": {"lr": 0.1}, "device": "cpu"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of a plugin, and one of a Python file taught by it."""
    from training import train

    home = tmp_path_factory.mktemp("made")
    (home / "own.py").write_text(LOSS)
    (home / "net.py").write_text(NETWORK)
    plugin = {**PLAIN, **SUPERVISED, "name": "taught", "plugins": ["own.py"], "losses": [{"use": "own"}], "train": SMALL}
    data = {**PLAIN["data"]["dataset"], "channels": 1}
    plugin["data"] = {**PLAIN["data"], "dataset": data}
    network = {**PLAIN, "data": plugin["data"], "train": SMALL, "teacher": {"recipe": "taught.yaml"}, "run": {"folder": str(home)}}
    write(home, plugin, "taught.yaml")
    train(home, {**network, "student": {"model": "python/Net", "file": "net.py"}}, into="run")
    return home


@pytest.fixture
def home(made, tmp_path, trap):
    """The runs in the hands of somebody else, whose Python leaves a mark."""
    import shutil

    shutil.copytree(made, tmp_path / "home")
    for run in ("run", "taught"):
        file = tmp_path / "home" / run / "recipe.yaml"
        _, _, text = file.read_text().partition("\n")  # its digest aside
        file.write_text(text.replace(str(made), str(tmp_path / "home")))
    trap.write(tmp_path / "home" / "own.py", LOSS)
    trap.write(tmp_path / "home" / "net.py", NETWORK)
    return tmp_path / "home"


def command(*words):
    """What a command says on stderr, and its exit code."""
    import contextlib
    import io

    from kdkit import cli

    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["kdkit", *map(str, words)])
        try:
            cli.main()
        except SystemExit as end:
            return said.getvalue(), end.code or 0
    return said.getvalue(), 0


READERS = {"evaluate": (), "predict": (".",), "export": (), "export --format onnx": (), "profile": ("--runs", "1", "--cpu")}


@pytest.mark.parametrize(("run", "file"), [("run", "net.py"), ("taught", "own.py")])
@pytest.mark.parametrize("reader", READERS)
def test_a_run_s_python_does_not_run_unasked(home, trap, reader, run, file):
    name, *options = reader.split()
    said, code = command(name, home / run, *options, *READERS[reader])
    advice = f"; if you trust it, add --plugins {home / file}\n"
    assert code == 2 and said.count("\n") == 1 and said.endswith(advice) and "Python of a run does not run unasked" in said
    assert not trap.sprung


def test_a_run_s_python_runs_when_it_is_named(home, trap, capsys):
    said, code = command("evaluate", home / "taught", "--plugins", home / "own.py")
    assert (code, said) == (0, "") and trap.sprung
    said, code = command("evaluate", home / "run", "--plugins", home / "net.py")  # its teacher's run names another file
    assert code == 2 and said.endswith(f"if you trust it, add --plugins {home / 'own.py'}\n")
    assert command("evaluate", home / "run", "--plugins", home) == ("", 0)
    assert "teacher" in capsys.readouterr().out


def test_a_run_s_python_may_have_moved(home, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("net.py", "own.py"):
        (home / name).rename(moved / name)
    assert command("evaluate", home / "run", "--plugins", moved / "net.py", "--plugins", moved / "own.py") == ("", 0)


def test_load_student_runs_what_it_is_told(home, trap):
    import kdkit

    with pytest.raises(KdkitError, match="Python of a run does not run unasked"):
        kdkit.load_student(home / "run")
    assert not trap.sprung
    assert kdkit.load_student(home / "run", plugins=[home / "net.py"]).module is not None


@pytest.mark.slow
def test_a_report_leaves_out_what_would_run_python(home, trap, capsys):
    assert command("report", home / "run", home / "taught", "--output", home / "told") == ("", 0)
    out = capsys.readouterr().out
    assert f"if you trust it, add --plugins {home / 'net.py'}\n" in out and f"add --plugins {home / 'own.py'}\n" in out
    assert not trap.sprung and (home / "told" / "report.html").is_file()
    assert command("report", home / "run", home / "taught", "--output", home / "told", "--plugins", home) == ("", 0)
    assert trap.sprung and "left out: the answers" not in capsys.readouterr().out


def test_a_result_may_not_name_python_that_the_recipe_does_not(home, trap):
    """Of several students the best one's network is written down in the result."""
    result = home / "taught" / "result.json"
    saved = {key: value for key, value in json.loads(result.read_text()).items() if key != "sha256"}
    trap.write(home / "evil.py", NETWORK)
    result.write_text(json.dumps({**saved, "network": {"model": "python/Net", "file": str(home / "evil.py")}}))
    for file, text in (("own.py", LOSS), ("net.py", NETWORK)):
        (home / file).write_text(text)
    for words in (("evaluate", home / "taught", "--plugins", home / "own.py"), ("train", home / "recipe.yaml", f"run.folder={home}")):
        said, code = command(*words)
        assert code == 2 and "evil.py, which its recipe does not name" in said.splitlines()[-1]
    assert not trap.sprung


def test_it_is_said_which_python_runs_and_who_named_it(home, capsys):
    write(home, {"extends": "taught.yaml", "name": "mine"}, "mine.yaml")
    said, code = command("check", home / "recipe.yaml")
    assert code == 0 and sorted(said.splitlines()) == [
        f"runs {home / 'net.py'}, which {home / 'recipe.yaml'}:{line_of(home / 'recipe.yaml', 'file:')} names",
        f"runs {home / 'own.py'}, which {home / 'taught.yaml'}:{line_of(home / 'taught.yaml', '- own.py')} names",
    ]
    line = f"{home / 'taught.yaml'}:{line_of(home / 'taught.yaml', '- own.py')}"
    assert command("check", home / "mine.yaml") == (f"runs {home / 'own.py'}, which {line} names\n", 0)
    study = write(home, {"name": "study", "base": "taught.yaml", "variants": {"one": None}}, "study.yaml")
    assert command("compare", study, "--dry") == (f"runs {home / 'own.py'}, which {line} names\n", 0)


def line_of(file, text):
    return next(i for i, line in enumerate(file.read_text().splitlines(), 1) if text in line)


@pytest.mark.parametrize("name", ["check", "train", "compare"])
@pytest.mark.parametrize(("file", "script"), [("taught.yaml", "own.py"), ("recipe.yaml", "net.py"), ("plain.yaml", "own.py")])
def test_no_plugins(home, trap, name, file, script):
    teacher = {"recipe": "taught.yaml"}
    write(home, {**PLAIN, "teacher": teacher, "train": SMALL}, "plain.yaml")
    said, code = command(name, home / file, "--no-plugins", f"run.folder={home / 'runs'}")
    assert code == 2 and said.count("\n") == 1 and f"names {home / script}, which --no-plugins does not let run" in said
    assert not trap.sprung


def test_an_exported_folder_runs_no_python(home, trap, tmp_path):
    """Its options may name a file although it says that it needs none."""
    import kdkit

    options = {"model": "python/Net", "file": str(trap.write(tmp_path / "evil.py", NETWORK))}
    about = {"version": "0", "options": options, "needs_files": [], "num_classes": 6, "image_shape": [1, 8, 8], "class_names": []}
    (tmp_path / "config.json").write_text(json.dumps({"kdkit": about}))
    (tmp_path / "model.safetensors").write_bytes((home / "run" / "student.safetensors").read_bytes())
    with pytest.raises(KdkitError, match="evil.py") as caught:
        kdkit.load_student(tmp_path)
    assert "\n" not in str(caught.value) and not trap.sprung


def test_a_teacher_s_recipe_is_not_followed_from_a_run(home, trap):
    """The recipe of the run's teacher names Python; only its run folder is looked for."""
    trap.write(home / "own.py", LOSS)
    evil = home / "evil"
    evil.mkdir()
    trap.write(evil / "own.py", LOSS)
    (evil / "taught.yaml").write_text((home / "taught.yaml").read_text())
    for run in ("run", "taught"):
        (home / run / "recipe.yaml").write_text(
            (home / run / "recipe.yaml").read_text().replace(str(home / "taught.yaml"), str(evil / "taught.yaml"))
        )
    (home / "net.py").write_text(NETWORK)
    command("evaluate", home / "run", "--plugins", home / "net.py")
    command("profile", home / "run", "--plugins", home / "net.py", "--runs", "1", "--cpu")
    command("report", home / "run", "--output", home / "told", "--plugins", home / "net.py")
    assert not trap.sprung


def test_a_hub_is_asked_for_what_a_run_names(tmp_path, monkeypatch):
    from kdkit.recipe import registry

    asked = []

    def download(name, *_, **__):
        asked.append(name)
        raise OSError("no hub here")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    source = registry.load().models["timm"]
    with pytest.raises(KdkitError):
        source(source.Options(model="hf-hub:owner/name"), "hf-hub:owner/name").build(3, (3, 8, 8))
    assert asked == ["owner/name"]


# What is shown and written


EVIL_TEXT = "\x1b]0;owned\x07[red]\x1b[2J"


def test_control_characters_and_markup_are_shown_as_text(home, capsys):
    recipe_file = home / "taught" / "recipe.yaml"
    plain = yaml.safe_load(recipe_file.read_text())
    plain["schedule"]["note"] = EVIL_TEXT
    recipe_file.write_text(yaml.safe_dump(plain))
    assert command("show", home / "taught")[1] == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out and r"\x1b]0;owned\x07[red]\x1b[2J" in out
    assert out.count("\n") > 10


def test_show_runs_no_python(home, trap, capsys):
    assert command("show", home / "run") == ("", 0)
    assert "python/Net" in capsys.readouterr().out and not trap.sprung


def test_a_report_escapes_what_strangers_write(home):
    from kdkit.study.report import page
    from kdkit.study.report.document import Document

    evil = "<script>alert(1)</script>![x](javascript:alert(1))"
    document = Document(title=evil, question=evil, answer=[evil], sections=[])
    assert "<script>" not in page.html(document)
    written = page.markdown(document, "report")
    assert not re.search(r"(?<!\\)[<\[]", written)  # every sign that begins something is escaped


CELLS = ["=1+1", "+SUM(A1)", "-2+3", "@x", "\tx", "\r=1", "plain\r=1", "-0.5", -0.5, 3, None, "a,b", 'a"b']


def test_cells_of_csv_are_no_formulas():
    import csv
    import io

    from kdkit.spreadsheets import as_csv

    written = as_csv([str(i) for i in range(len(CELLS))], [CELLS])
    _, read = csv.reader(io.StringIO(written, newline=""))
    assert read == ["'=1+1", "'+SUM(A1)", "'-2+3", "'@x", "'\tx", "' =1", "plain =1", "-0.5", "-0.5", "3", "", "a,b", 'a"b']


def test_links_are_not_written_through(home, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("mine")
    (home / "taught" / "curves.png").symlink_to(elsewhere / "precious")
    (home / "taught" / "export").symlink_to(elsewhere)
    (home / "report").symlink_to(elsewhere)
    assert command("show", home / "taught")[1] == 0
    said, code = command("export", home / "taught", "--plugins", home / "own.py")
    assert code == 2 and f"taught/export: is a link to {elsewhere}; name that folder by --output" in said
    said, code = command("report", home / "taught")
    assert code == 2 and "report: is a link, and pictures would be written where it leads" in said
    assert (elsewhere / "precious").read_text() == "mine" and [path.name for path in elsewhere.iterdir()] == ["precious"]
    assert not (home / "taught" / "curves.png").is_symlink()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.onnx"])
def test_an_export_replaces_nothing_of_others(home, name):
    folder = home / "mine"
    folder.mkdir()
    (folder / name).write_text("{}")
    said, code = command("export", home / "taught", "--plugins", home / "own.py", "--output", folder)
    assert code == 2 and said.count("\n") == 1 and "is not kdkit's, and would be replaced" in said
    assert (folder / name).read_text() == "{}"


def test_a_report_replaces_nothing_of_others(home, monkeypatch):
    from kdkit.study.report import output

    monkeypatch.setattr(output, "gather", lambda *_: (None, home))
    (home / "report.md").write_text("mine")
    with pytest.raises(KdkitError, match="report.md: is there already, and is no report of kdkit's"):
        output._refuse_foreign(home, ["report.md"])
    (home / "report.json").write_text('{"findings": {}}')
    output._refuse_foreign(home, ["report.md"])


def test_what_a_run_says_of_itself_is_not_proved(home, capsys):
    result = home / "taught" / "result.json"
    saved = {key: value for key, value in json.loads(result.read_text()).items() if key != "sha256"}
    result.write_text(json.dumps({**saved, "test": {**saved["test"], "top1": 99.99}}))
    assert command("show", home / "taught")[1] == 0
    assert "99.99" in capsys.readouterr().out


def test_a_run_fetches_data_when_it_is_asked_to(home, monkeypatch):
    from kdkit.recipe import fetching
    from kdkit.students.loaded import LoadedRun

    asked = []
    monkeypatch.setattr(fetching, "fetch", lambda recipe, source, say: asked.append(source.name))
    LoadedRun(home / "taught", plugins=[home / "own.py"]).data()
    assert not asked
    run = LoadedRun(home / "taught", plugins=[home / "own.py"])
    run._fetch = True  # what `data.dataset.download=true` sets, which this dataset has not
    run.data()
    assert asked == ["synthetic"]


# Caches


def store_at(path, rows=4):
    from kdkit.cache.rows import Column
    from kdkit.cache.store import AnswerStore

    about = {"teacher": EVIL_TEXT, "data": "[/red]", "images": rows, "views": 1}
    return AnswerStore(path, [Column("logits", (2,), "float32")], rows, about)


def test_clearing_removes_a_cache_s_own_files_only(tmp_path):
    from kdkit.cache.folder import clear

    home, name = tmp_path / "caches", "taught-0123456789abcdef"
    store_at(home / name).close()
    (home / name / "mine.txt").write_text("mine")
    store_at(tmp_path / "other" / name).close()
    (home / "linked-0123456789abcdef").symlink_to(tmp_path / "other" / name)
    (home / "build-0123456789abcdef").mkdir()
    (home / "build-0123456789abcdef" / "cache.json").write_text("{}")  # another program's
    assert {found.path.name for found in clear(home)} == {name, "linked-0123456789abcdef"}
    assert sorted(str(path.relative_to(home)) for path in home.rglob("*")) == [
        "build-0123456789abcdef", "build-0123456789abcdef/cache.json", name, f"{name}/mine.txt"
    ]  # fmt: skip
    assert (tmp_path / "other" / name / "cache.json").is_file()


def test_a_cache_of_links_is_damaged(tmp_path):
    store = store_at(tmp_path / "taught-0123456789abcdef")
    store.close()
    column = store.path / "column-0.bin"
    precious = tmp_path / "precious"
    precious.write_bytes(b"x" * column.stat().st_size)
    column.unlink()
    column.symlink_to(precious)
    with pytest.raises(KdkitError, match="column-0.bin is damaged or missing"):
        store_at(store.path)
    assert set(precious.read_bytes()) == set(b"x")


def test_a_list_of_caches_shows_text(tmp_path, capsys):
    store_at(tmp_path / "taught-0123456789abcdef").close()
    assert command("cache", "--list", "--dir", tmp_path) == ("", 0)
    out = capsys.readouterr().out
    assert "\x1b" not in out and "[/red]" in out and r"\x1b[2J" in out


def test_a_cache_says_what_was_written_into_it(tmp_path):
    store = store_at(tmp_path / "taught-0123456789abcdef")
    forged = torch.tensor([[9.0, -9.0]])
    store.write(torch.tensor([1]), {"logits": forged})
    assert torch.equal(store.read(torch.tensor([1]))["logits"], forged)
    store.close()


# The page


def test_a_recipe_s_python_runs_when_it_is_checked(home, trap):
    assert command("check", home / "recipe.yaml")[1] == 0 and trap.sprung


HERE = {
    "R1": [test_a_check_connects_to_nothing, test_a_check_asks_no_hub, test_a_check_needs_no_pretrained_weights],
    "R2": [test_keywords_of_a_loader_are_no_configuration],
    "R3": [test_a_folder_with_python_of_its_own_runs_nothing, test_a_tokenizer_with_python_of_its_own_runs_nothing],
    "R4": [
        test_files_that_are_pickles_are_no_dataset,
        test_pickles_that_are_not_what_they_should_be,
        test_a_community_s_dataset_is_refused,
    ],
    "R5": ["plugins/test_image_folder.py::test_several_want_the_same_archive"],
    "R6": [test_where_files_are_fetched_to],
    "R7": ["plugins/test_image_folder.py::test_without_download_nothing_is_fetched"],
    "R8": [
        "plugins/test_image_folder.py::test_links_and_other_files_stay_in_the_archive",
        "plugins/test_image_folder.py::test_an_archive_that_leads_outside_is_refused",
    ],
    "R9": ["plugins/test_image_folder.py::test_archives_that_are_too_large"],
    "R10": [test_a_recipe_s_python_runs_when_it_is_checked],
    "R11": [test_it_is_said_which_python_runs_and_who_named_it],
    "R12": [test_no_plugins],
    "R13": [test_a_check_connects_to_nothing],
    "F1": [test_a_run_s_python_does_not_run_unasked, test_load_student_runs_what_it_is_told],
    "F2": [test_a_report_leaves_out_what_would_run_python],
    "F3": [test_show_runs_no_python],
    "F4": [test_a_result_may_not_name_python_that_the_recipe_does_not],
    "F5": [test_a_run_fetches_data_when_it_is_asked_to],
    "F6": [test_control_characters_and_markup_are_shown_as_text, test_a_report_escapes_what_strangers_write],
    "F7": [test_cells_of_csv_are_no_formulas],
    "F8": [test_links_are_not_written_through],
    "F9": [test_an_export_replaces_nothing_of_others, test_a_report_replaces_nothing_of_others],
    "F10": [test_a_run_s_python_runs_when_it_is_named],
    "F11": [test_a_hub_is_asked_for_what_a_run_names],
    "F12": [test_what_a_run_says_of_itself_is_not_proved],
    "C1": [test_a_checkpoint_that_would_run_python],
    "C2": [test_a_checkpoint_that_is_none, test_a_checkpoint_that_is_compressed],
    "E1": [
        test_an_exported_folder_runs_no_python,
        "test_export.py::test_a_network_of_the_user_s_file_is_described_without_the_file_s_place",
    ],
    "K1": [test_clearing_removes_a_cache_s_own_files_only],
    "K2": [test_a_cache_of_links_is_damaged],
    "K3": [test_a_list_of_caches_shows_text],
    "K4": [test_a_cache_says_what_was_written_into_it],
}


def test_each_sentence_of_the_page_has_a_test():
    home = Path(__file__).parent
    page = (home.parent / "docs" / "explanation" / "strangers-files.md").read_text()
    bullets = [line for line in page.splitlines() if line.startswith("- ")]
    assert [re.match(r"- \*\*([A-Z]\d+)\*\* ", line)[1] for line in bullets] == list(HERE)
    for tests in HERE.values():
        for name in filter(lambda one: isinstance(one, str), tests):
            file, _, test = name.partition("::")
            assert f"\ndef {test}(" in (home / file).read_text()
