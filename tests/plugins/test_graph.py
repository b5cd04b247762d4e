"""Nodes as samples, networks that hold their graph, and a perceptron that learns from one."""

import sys

import numpy
import pytest
import torch
from training import PLAIN, assert_same_run, metrics, stop_and_go_on, train, write

import kdkit
from kdkit.recipe import load, registry
from kdkit.runs.run import Run
from kdkit.study.lockstep import train_together

pytest.importorskip("torch_geometric")
GraphNodes, GraphSource = registry.load().datasets["graph_nodes"], registry.load().models["graph"]
# a path of 12 nodes, and a node without an edge
EDGES = [[*range(11)], [*range(1, 12)]]


def save(path, **changes):
    draw = numpy.random.default_rng(0)
    arrays = {"features": draw.random((13, 5)), "labels": [i % 3 for i in range(13)], "edges": EDGES}
    arrays |= {"train": [0, 1, 2, 3, 4, 5], "test": [9, 10, 11], **changes}
    numpy.savez(path, **{name: numpy.array(value) for name, value in arrays.items() if value is not None})
    return path


def data(file=None, **options):
    return GraphNodes(GraphNodes.Options(file=file, **options))


def network(file=None, name="sage", shape=(8, 1, 1), classes=3, **options):
    torch.manual_seed(0)
    made = GraphSource(GraphSource.Options(model=f"graph/{name}", file=file, hidden=4, **options), name)
    return made.build(classes, shape).eval()


def samples(source, part="train"):
    return source.split(part).images.float() / 255


def test_samples_are_features_and_number(tmp_path):
    file = save(tmp_path / "g.npz")
    info, part = data(file).info(), data(file).split("test")
    assert (info.image_shape, info.outputs, info.num_train, info.num_test) == ((8, 1, 1), 3, 6, 3)
    assert info.fields == {"features": 5, "node": 3} and part.labels.tolist() == [0, 1, 2]
    assert part.images[:, 5:].flatten(1).tolist() == [[0, 0, i] for i in (9, 10, 11)]
    kept = numpy.round(numpy.load(file)["features"][9:12] * 255)
    assert numpy.array_equal(part.images[:, :5].flatten(1).numpy(), kept)


@pytest.mark.parametrize(("inductive", "count"), [(False, 13), (True, 10)])
def test_all_nodes_have_no_labels_and_new_ones_are_not_among_them(tmp_path, inductive, count):
    source = data(save(tmp_path / "g.npz"), nodes="all", inductive=inductive)
    assert not source.info().labelled and source.info().num_train == len(source.split("train")) == count


def test_the_made_graph_is_as_announced():
    source = data()
    graph, again, other = source._graph, data()._graph, data(graph_seed=1)._graph
    assert torch.equal(graph.edges, again.edges) and torch.equal(graph.features, again.features)
    assert not torch.equal(graph.features, other.features)
    assert graph.labels[graph.train].bincount().tolist() == [20] * 7 and len(graph.test) == 1000
    assert not torch.isin(graph.test, graph.train).any()
    assert torch.equal(graph.edges.flip(0).unique(dim=1), graph.edges)
    alike = graph.labels[graph.edges[0]] == graph.labels[graph.edges[1]]
    assert float(alike.float().mean()) == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize("name", ["sage", "gat"])
def test_a_neighbourhood_gives_what_the_whole_graph_gives(tmp_path, name):
    file = save(tmp_path / "g.npz")
    net, nodes = network(file, name), samples(data(file, nodes="all"))
    with torch.no_grad():
        whole = net.network(net.features, net.edges)
        torch.testing.assert_close(net(nodes), whole)
        for i in (0, 6, 12):
            torch.testing.assert_close(net(nodes[[i]]), whole[[i]])


def test_two_layers_see_two_steps(tmp_path):
    file = save(tmp_path / "g.npz")
    net, nodes = network(file), samples(data(file, nodes="all"))
    before = net(nodes)
    net.features[5] += 1
    # number 5 itself has another feature now, which its sample has not
    changed = (net(nodes[[*range(5), *range(6, 13)]]) != before[[*range(5), *range(6, 13)]]).any(1)
    assert changed.nonzero().flatten().tolist() == [3, 4, 5, 6]  # the nodes 3, 4, 6 and 7


def test_nobody_reads_a_node_that_comes_later(tmp_path):
    file = save(tmp_path / "g.npz")
    net, nodes = network(file, inductive=True), samples(data(file, inductive=True))
    late = samples(data(file, inductive=True), "test")
    seen, new = net(nodes), net(late)
    net.features[8] += 1  # the neighbour of 9
    assert torch.equal(net(nodes), seen) and not torch.equal(net(late), new)
    net, others = network(file, inductive=True), samples(data(file, inductive=True, nodes="all"))
    before = net(others)
    net.features[9] += 1
    assert torch.equal(net(others), before)


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32", "uint64"])
def test_whole_numbers_of_any_type_are_read(tmp_path, kind):
    plain, file = save(tmp_path / "g.npz"), tmp_path / "h.npz"
    arrays = dict(numpy.load(plain))
    numpy.savez(file, **{name: x if name == "features" else x.astype(kind) for name, x in arrays.items()})
    assert torch.equal(data(file)._graph.edges, data(plain)._graph.edges)
    assert torch.equal(data(file).split("test").labels, data(plain).split("test").labels)


def test_labels_of_nodes_in_neither_part_are_not_read(tmp_path):
    file = save(tmp_path / "g.npz", labels=[i % 3 if i != 7 else 99 for i in range(13)])
    assert data(file).info().outputs == 3


def test_bytes_that_a_device_divides_in_another_way_are_of_the_same_node(tmp_path):
    file = save(tmp_path / "g.npz")
    images = data(file).split("train").images
    assert torch.equal(network(file)(images * torch.tensor(1 / 255)), network(file)(images.float() / 255))


def test_numbers_of_nodes_are_not_normalised():
    with pytest.raises(ValueError, match="normalize: would change the numbers of the nodes"):
        GraphSource.Options(model="graph/sage", normalize={"mean": [0.5], "std": [0.5]})


def test_samples_of_another_graph_are_refused(tmp_path):
    file, other = save(tmp_path / "g.npz"), save(tmp_path / "h.npz", features=numpy.zeros((13, 5)))
    net, nodes = network(file), samples(data(file))
    for wrong in (samples(data(other)), samples(data(file, inductive=True)), torch.where(torch.arange(8)[:, None, None] == 7, 1.0, nodes)):
        with pytest.raises(kdkit.ModelError, match="no node of this graph: data and network must name"):
            net(wrong)
    assert net(torch.rand(4, 8, 1, 1)).shape == (4, 3)  # with such, a check tries it


WRONG = {
    "no file": (None, "there is no such file"),
    "an array is missing": ({"labels": None}, "has no array 'labels'"),
    "shape": ({"edges": [[0, 1]]}, r"'edges' has the shape \(1, 2\), not \(2, E\)"),
    "type": ({"labels": [0.5] * 13}, "'labels' is torch.float64, not whole numbers"),
    "range": ({"features": [[2.0]] * 13}, "'features' go from 2 to 2; scale them to 0 to 1"),
    "not a number": ({"features": [[float("nan")]] * 13}, "'features' go from nan to nan"),
    "nodes": ({"labels": [0, 1]}, "13 nodes have 'features', 2 'labels'"),
    "an edge to nowhere": ({"edges": [[0], [13]]}, "'edges' names the nodes 0 to 13, and there are 13"),
    "both parts": ({"test": [5, 6]}, "'train' and 'test' have nodes in common"),
    "no class": ({"labels": [-1] * 13}, "a negative class"),
    "no class of a test node": ({"labels": [0] * 9 + [-1] * 4}, "a negative class"),
    "more classes than nodes": ({"labels": [10**8] * 13}, "class 100000000, counted from 0, and there are 13 nodes"),
    "a mask": ({"train": [True] * 6 + [False] * 7}, "'train' is torch.bool, not whole numbers"),
    "a pickle": ({"labels": [{}] * 13}, "damaged"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, what):
    changes, says = WRONG[what]
    file = tmp_path / "g.npz"
    if changes is not None:
        save(file, **changes)
    with pytest.raises(kdkit.DataError, match=says) as told:
        data(file).info()
    assert "\n" not in str(told.value) and "g.npz" in str(told.value)
    with pytest.raises(kdkit.ModelError, match=says):
        network(file)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"name": "gin"}, "'gin' is no graph network; there are gat, sage"),
        ({"shape": (9, 1, 1)}, r"5 features, .* samples of shape \(8, 1, 1\); the samples are \(9, 1, 1\)"),
        ({"classes": 0}, "without classes"),
    ],
)
def test_networks_that_cannot_be_built(tmp_path, given, says):
    with pytest.raises(kdkit.ModelError, match=says):
        network(save(tmp_path / "g.npz"), **given)


def test_the_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_geometric.nn", None)
    with pytest.raises(kdkit.ModelError, match="pip install 'kdkit\\[graph\\]'"):
        network(save(tmp_path / "g.npz"))


def recipe(tmp_path, **changes):
    save(tmp_path / "g.npz")
    dataset = {"use": "graph_nodes", "file": "g.npz"}
    return {
        **PLAIN,
        "data": {"dataset": dataset, "batch_size": 4, "unlabelled": {"dataset": {**dataset, "nodes": "all"}, "share": 0.5}},
        "teacher": {"model": "graph/sage", "file": "g.npz", "hidden": 4},
        "student": {"model": "mlp/4", "input": {"field": "features"}},
        "losses": [{"use": "logit_kl", "temperature": 1}],
        **changes,
    }


def test_a_perceptron_learns_from_a_graph_network(tmp_path):
    whole = train(tmp_path, recipe(tmp_path))
    assert [line for line in metrics(tmp_path / "run") if line["kind"] == "epoch"]
    student = kdkit.load_student(whole.folder)
    features = samples(data(tmp_path / "g.npz"))[:, :5]
    assert student(features).logits.shape == (6, 3)  # it needs no graph


ALONE = {"teacher": None, "schedule": {"use": "supervised"}, "losses": [{"use": "cross_entropy"}]}
RUNS = {"student": {}, "teacher": {**ALONE, "student": {"model": "graph/sage", "file": "g.npz", "hidden": 4}}}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_with_the_same_bits(tmp_path, monkeypatch, name):
    path = write(tmp_path, recipe(tmp_path, **RUNS[name]))
    train(tmp_path, recipe(tmp_path, **RUNS[name]), into="whole")
    stop_and_go_on(path, tmp_path / "run", monkeypatch)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_side_by_side_they_end_with_the_same_bits(tmp_path):
    labelled = [{"use": "cross_entropy"}, {"use": "logit_kl", "temperature": 1}]
    variants = {"one": recipe(tmp_path), "other": recipe(tmp_path, losses=labelled)}
    runs = [Run(load(write(tmp_path, {**each, "name": "run"}, f"{name}.yaml")), tmp_path / name) for name, each in variants.items()]
    assert all(outcome.reason is None for outcome in train_together(runs))
    for name, each in variants.items():
        train(tmp_path, {**each, "name": "run"}, into=f"{name}_alone")
        assert_same_run(tmp_path / name, tmp_path / f"{name}_alone")
