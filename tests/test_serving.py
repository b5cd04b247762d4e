"""A teacher that answers from another process: the same numbers as one that is here; what is lost is waited for, what is wrong is told."""

import contextlib
import http.client
import json
import threading
import time

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from training import EVERYTHING, PLAIN, assert_same_run, train, write

import kdkit
from kdkit import recipe
from kdkit.cache import connections, served, wire
from kdkit.cache.heads import Head
from kdkit.cache.teacher import autocast
from kdkit.contracts.records import Outputs
from kdkit.models.tapped import TappedModel
from kdkit.runs import checks, serving
from kdkit.study import comparison, loading

TOKEN = "a secret of this test, 鍵"  # whatever signs it has
HINT = {"use": "hint", "layers": [{"student": "stage3", "teacher": "stage3"}]}
FEATURES = {**PLAIN, "losses": [{"use": "cross_entropy"}, {"use": "logit_kl"}, HINT]}


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv(wire.TOKEN, TOKEN)
    monkeypatch.setattr(connections, "AGAIN", 0.02)


@contextlib.contextmanager
def serving_of(path, port=0, token=TOKEN):
    """The server of a recipe's teachers, answering in a thread."""
    with serving.Server(serving.Teachers.of(recipe.load(path)), "127.0.0.1", port, token) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def answers(server):
    """Counts the batches that a server answers."""
    count, answer = [], server.teachers.answer
    server.teachers.answer = lambda *given: (count.append(None), answer(*given))[1]
    return count


@pytest.mark.first(2)
@pytest.mark.parametrize("base", [PLAIN, FEATURES, EVERYTHING], ids=["responses", "layers", "everything"])
def test_a_served_teacher_teaches_as_one_that_is_here(tmp_path, base):
    here = train(tmp_path, base, "here")
    with serving_of(write(tmp_path, base)) as server:
        asked = answers(server)
        away = train(tmp_path, base, "away", teacher={"at": server.address})
    assert_same_run(here.folder, away.folder)
    assert len(asked) >= 12  # its answers to the test images too


def test_what_the_classifier_reads_is_sent_in_place_of_logits(tmp_path):
    here = train(tmp_path, FEATURES, "here")
    with serving_of(write(tmp_path, FEATURES)) as server:
        questions, answer = [], server.teachers.answer
        server.teachers.answer = lambda asked, inputs: (questions.append(asked), answer(asked, inputs))[1]
        away = train(tmp_path, FEATURES, "away", teacher={"at": server.address, "sends": "hidden"})
    assert_same_run(here.folder, away.folder)
    assert len(questions) > 12 and not any(asked["logits"] for asked in questions)
    assert all(asked["layers"][-1] == "penultimate" for asked in questions)


class Headed(nn.Module):
    """A network with a head that ends it, or not."""

    def __init__(self, head, end):
        super().__init__()
        self.body, self.head, self.end = nn.Linear(5, 16), head, end

    def forward(self, x):
        return self.end(self.head(self.body(x.mean((2, 3)).repeat(1, 5)[:, :5]).relu()))

    def get_classifier(self):
        return self.head


@pytest.mark.parametrize("own", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("callers", [None, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_classifier_that_is_applied_elsewhere_gives_the_same_logits(own, callers, bias):
    model = TappedModel(Headed(nn.Linear(16, 7, bias), nn.Identity()), ["penultimate"], precision=own).freeze()
    head = Head.of(model, (3, 4, 4))
    head = Head.unpacked(head.packed(), json.loads(json.dumps(head.about())))
    with autocast(torch.device("cpu"), callers):
        answer = model(torch.rand(9, 3, 4, 4))
    sent = wire.unpack_answer(*wire.pack_answer(answer, logits=False))[1]["penultimate"]
    logits = head(sent, callers)
    assert torch.equal(logits, answer.logits) and logits.dtype == answer.logits.dtype


NO_HEADS = {
    "a layer behind it": (nn.Linear(16, 7), nn.Linear(7, 7), "something changes them afterwards"),
    "a softmax": (nn.Linear(16, 7), nn.Softmax(1), "something changes them afterwards"),
    "no linear layer": (nn.Tanh(), nn.Identity(), "not Tanh"),
}


@pytest.mark.parametrize("head, end, says", NO_HEADS.values(), ids=NO_HEADS)
def test_what_does_not_end_in_one_linear_layer_keeps_its_classifier(head, end, says):
    model = TappedModel(Headed(head, end), role="teacher").freeze()
    with pytest.raises(kdkit.RunError) as caught:
        Head.of(model, (3, 4, 4))
    assert str(caught.value).startswith("teacher: `sends: hidden` needs logits that one linear layer gives") and says in str(caught.value)


def test_a_teacher_without_such_a_classifier_is_refused(tmp_path):
    base = {**PLAIN, "teacher": {**PLAIN["teacher"], "num_classes": 8, "classes": [0, 1, 2, 3, 4, 5]}}
    with serving_of(write(tmp_path, base)) as server, pytest.raises(kdkit.RunError) as caught:
        train(tmp_path, base, teacher={"at": server.address, "sends": "hidden"})
    assert f"teacher: {server.address} refuses: teacher" in str(caught.value) and "`sends: hidden` needs" in str(caught.value)


def test_another_classifier_than_was_told_of_is_refused():
    model = TappedModel(Headed(nn.Linear(16, 7), nn.Identity())).freeze()
    head = Head.of(model, (3, 4, 4))
    about = head.about()
    model.module.head.bias += 1
    with pytest.raises(kdkit.RunError, match="sent another classifier than it has told of"):
        Head.unpacked(head.packed(), about)


def test_a_teacher_of_another_recipe(tmp_path):
    taught = {**PLAIN, "name": "big", "teacher": None, "schedule": {"use": "supervised"}, "losses": [{"use": "cross_entropy"}]}
    write(tmp_path, taught, "teacher.yaml")
    base = {**PLAIN, "teacher": {"recipe": "teacher.yaml"}, "run": {"folder": str(tmp_path / "runs"), "log_steps": 1}}
    here = train(tmp_path, base, "here")
    with serving_of(write(tmp_path, base)) as server:
        elsewhere = {"run": {"folder": str(tmp_path / "other runs")}, "teacher": {"at": server.address}}
        away = train(tmp_path, base, "away", **elsewhere)
    assert (tmp_path / "other runs" / "big").exists() is False  # nothing was trained here
    assert away.test == here.test and away.teacher == here.teacher


def test_several_servers_share_the_batches(tmp_path):
    here = train(tmp_path, into="here")
    path = write(tmp_path)
    with serving_of(path) as one, serving_of(path) as other:
        counts = answers(one), answers(other)
        away = train(tmp_path, into="away", teacher={"at": [one.address, other.address]})
    assert_same_run(here.folder, away.folder)
    assert min(map(len, counts)) >= 6


def test_runs_side_by_side_ask_once(tmp_path):
    variants = {"a": {}, "b": {"losses": [{"use": "logit_kl", "temperature": 2}]}}
    write(tmp_path, PLAIN, "base.yaml", run={"folder": str(tmp_path / "runs")})
    with serving_of(tmp_path / "base.yaml") as server:
        asked = answers(server)
        write(tmp_path, PLAIN, "base.yaml", run={"folder": str(tmp_path / "runs")}, teacher={"at": server.address})
        study = {"name": "both", "base": "base.yaml", "baseline": "a", "variants": variants, "seeds": 1}
        found = comparison.compare(loading.load([write(tmp_path, study, "study.yaml")]))
    assert found is not None
    assert len(asked) < 2 * 2 * 6  # fewer than the steps of both


def test_answers_are_asked_for_ahead(tmp_path, monkeypatch):
    events = []
    for name in ("send", "received"):
        monkeypatch.setattr(served.ServedTeacher, name, _noted(getattr(served.ServedTeacher, name), name, events))
    with serving_of(write(tmp_path)) as server:
        train(tmp_path, teacher={"at": server.address})
    training = events[events.index("send", 2) :]
    # of six batches, the next one is on its way before the answer to this one is taken
    assert ["send", *["send", "received"] * 5, "received"] * 2 == events[-24:], training


def _noted(call, name, events):
    def noted(*given, **more):
        events.append(name)
        return call(*given, **more)

    return noted


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the connection that breaks down
def test_a_lost_server_is_waited_for(tmp_path, capsys):
    here = train(tmp_path, into="here")
    path = write(tmp_path, PLAIN, "served.yaml")
    with serving_of(path) as server:
        port = server.server_address[1]
        _fail_after(server, 5)
        results = []
        away = threading.Thread(target=lambda: results.append(train(tmp_path, into="away", teacher={"at": server.address})))
        away.start()
        server.failed.wait()
    time.sleep(0.1)
    assert away.is_alive()
    with serving_of(path, port):
        away.join()
    assert_same_run(here.folder, results[0].folder)
    printed = capsys.readouterr()
    said = printed.out + printed.err
    assert said.count(f"127.0.0.1:{port} does not answer (") == 1 and f"127.0.0.1:{port} answers again" in said


def _fail_after(server, answers):
    """Let a server break down after some answers, without a word."""
    server.failed, answer = threading.Event(), server.teachers.answer
    count = iter(range(answers))

    def answered(*given):
        if next(count, None) is None:
            server.failed.set()
            raise SystemExit  # ends the thread of this connection
        return answer(*given)

    server.teachers.answer = answered


def test_another_token_is_refused(tmp_path, monkeypatch):
    with serving_of(write(tmp_path), token="another") as server, pytest.raises(kdkit.RunError) as caught:
        train(tmp_path, teacher={"at": server.address})
    says = f"teacher: {server.address} refuses: this is another token than the server's; both sides read KDKIT_TOKEN"
    assert str(caught.value) == says


def test_another_teacher_is_refused(tmp_path):
    other = {**PLAIN["teacher"], "args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}}
    with serving_of(write(tmp_path, {**PLAIN, "teacher": other})) as server, pytest.raises(kdkit.RunError) as caught:
        train(tmp_path, teacher={"at": server.address})
    assert str(caught.value) == f"teacher: {server.address} serves another 'teacher' than this recipe describes"


def test_a_server_of_other_classes_is_refused(tmp_path):
    data = {"dataset": {**PLAIN["data"]["dataset"], "num_classes": 5}}
    with serving_of(write(tmp_path, PLAIN, data=data)) as server, pytest.raises(kdkit.RunError) as caught:
        train(tmp_path, teacher={"at": server.address})
    assert str(caught.value) == f"teacher: {server.address} serves a 'teacher' of 5 classes, not 6"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the connection that breaks down
def test_another_teacher_in_place_of_a_lost_server_is_refused(tmp_path):
    base = {**PLAIN, "teacher": {**PLAIN["teacher"], "sends": "hidden"}}
    with serving_of(write(tmp_path, base, "served.yaml")) as server:
        address, port = server.address, server.server_address[1]
        _fail_after(server, 5)
        caught = []
        away = threading.Thread(target=lambda: caught.append(_refusal(tmp_path, base, address)))
        away.start()
        server.failed.wait()
    # other weights, by the same description
    with serving_of(write(tmp_path, base, "other.yaml", seed=1), port):
        away.join()
    assert caught == [f"teacher: {address} refuses: 'teacher' is another here than where this run began"]


def _refusal(folder, base, address):
    with pytest.raises(kdkit.RunError) as caught:
        train(folder, base, teacher={"at": address})
    return str(caught.value)


REQUESTS = {
    "no tensors": (wire.ANSWER, b"nonsense", '{"teacher": "teacher", "layers": [], "logits": true, "precision": null}', 400),
    "no question": (wire.ANSWER, None, "", 400),
    "no such teacher": (wire.ANSWER, None, '{"teacher": "large", "layers": [], "logits": true, "precision": null}', 400),
    "no such layer": (wire.ANSWER, None, '{"teacher": "teacher", "layers": ["os"], "logits": true, "precision": null}', 400),
    "no such type": (wire.ANSWER, None, '{"teacher": "teacher", "layers": [], "logits": true, "precision": "os"}', 400),
    "another teacher": (wire.ANSWER, None, '{"teacher": "teacher", "key": "0", "layers": [], "logits": true, "precision": null}', 400),
    "another head": (wire.HEAD, None, '{"teacher": "teacher", "head": {"sha256": "0"}}', 400),
    "other images": (
        wire.ANSWER,
        wire.pack_inputs(torch.rand(2, 5)),
        '{"teacher": "teacher", "layers": [], "logits": true, "precision": null}',
        400,
    ),
}


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with serving_of(write(tmp_path_factory.mktemp("server"))) as server:
        yield server


@pytest.mark.parametrize("path, body, asked, status", REQUESTS.values(), ids=REQUESTS)
def test_a_strange_request_gets_one_line(running, path, body, asked, status):
    body = wire.pack_inputs(torch.rand(2, 3, 8, 8)) if body is None else body
    client = http.client.HTTPConnection(running.address)
    client.request("POST", path, body, {"Authorization": wire.authorization(TOKEN), wire.ASKED: asked})
    answer = client.getresponse()
    assert answer.status == status
    text = answer.read().decode()
    assert text and "\n" not in text
    client.close()


@pytest.mark.parametrize("body", [b"<html>", b"[1]", b'{"teacher": 3}'])
def test_another_server_is_told(tmp_path, monkeypatch, body):
    monkeypatch.setattr(connections.Connection, "_once", lambda *given: (200, body, "[]"))
    with pytest.raises(kdkit.RunError) as caught:
        train(tmp_path, teacher={"at": "localhost:7070"})
    assert str(caught.value) == "teacher: what listens at localhost:7070 is no `kdkit serve`"


ANSWERS = {
    "no tensors": (False, lambda sent: (b"<html>", "[]"), "no tensors, or damaged ones"),
    "no layouts": (False, lambda sent: (wire.pack(sent)[0], "3"), "'int' object is not iterable"),
    "rows": (False, lambda sent: wire.pack({name: value[:1] for name, value in sent.items()}), "1 rows for 20 samples"),
    "no layer": (True, lambda sent: wire.pack({"other": torch.zeros(1)}), "'penultimate'"),
}


@pytest.mark.parametrize("hidden, change, says", ANSWERS.values(), ids=ANSWERS)
def test_an_answer_that_does_not_fit_is_one_line(tmp_path, monkeypatch, hidden, change, says):
    once = connections.Connection._once

    def changed(self, path, body, asked):
        status, data, last = once(self, path, body, asked)
        return (status, *change(wire.unpack(data))) if path == wire.ANSWER else (status, data, last)

    monkeypatch.setattr(connections.Connection, "_once", changed)
    with serving_of(write(tmp_path)) as server, pytest.raises(kdkit.RunError) as caught:
        train(tmp_path, teacher={"at": server.address, "sends": "hidden" if hidden else "logits"})
    assert str(caught.value).startswith("teacher: what its server sends is not what was asked for (") and says in str(caught.value)


def test_nothing_is_told_without_the_token(running):
    client = http.client.HTTPConnection(running.address)
    client.request("GET", wire.ABOUT)
    assert client.getresponse().status == 401
    client.close()


def test_an_answer_arrives_in_its_layout():
    layer = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    logits, layers = wire.unpack_answer(*wire.pack_answer(Outputs(torch.rand(2, 6), {"a": layer, "b": layer}), logits=False))
    assert logits is None and {*layers} == {"a", "b"}
    assert torch.equal(layers["a"], layer) and layers["a"].stride() == layer.stride()


REFUSED = {
    "cache": ({"cache": {"views": 1}}, {}, "answers that come from a server are not kept; leave `cache` out"),
    "address": ({"at": "localhost"}, {}, "localhost"),
    "weights": (
        {},
        {"losses": [{"use": "srrl", "layers": [{"student": "penultimate", "teacher": "penultimate"}]}]},
        "a loss reads the weights of teacher, which are elsewhere; leave it out",
    ),
}


@pytest.mark.parametrize("teacher, changes, says", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_served_is_refused_by_the_check(tmp_path, teacher, changes, says):
    with pytest.raises(kdkit.RecipeError) as caught:
        checks.make(recipe.load(write(tmp_path, PLAIN, teacher={"at": "localhost:7070", **teacher}, **changes)))
    assert says in str(caught.value)


def test_a_file_of_answers_is_not_served(tmp_path):
    save_file({"logits": torch.zeros(48, 6)}, tmp_path / "answers.safetensors")
    given = {"model": "answers/logits", "file": "answers.safetensors", "at": "localhost:7070"}
    with pytest.raises(kdkit.RecipeError) as caught:
        checks.make(recipe.load(write(tmp_path, {**PLAIN, "teacher": given})))
    assert "teacher.at: says how a network is built or asked, and answers alone have none" in str(caught.value)


def test_an_address_changes_no_fingerprint(tmp_path):
    plain, away = (recipe.load(write(tmp_path, teacher=teacher)) for teacher in ({}, {"at": ["a.org:1", "b.org:2"]}))
    assert plain.fingerprint == away.fingerprint
