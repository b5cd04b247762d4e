"""Graphs whose nodes are samples, for the dataset `graph_nodes` and the models of `graph`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import torch
from pydantic import BaseModel, Field
from torch import Tensor

import kdkit

from ..models._answer_files import array_file

CODE = (1 << 16, 1 << 8, 1)
"""A node's number is three bytes, the highest first."""
MOST = 1 << 23
SHAPES = {"features": "NF", "labels": "N", "edges": "2E", "train": "M", "test": "M"}
"""What a file holds."""

# of the graph that is made: nodes, classes, words of a node and edges are as many as in Cora
NODES, CLASSES, WORDS, EDGES = 2708, 7, 500, 5278
LABELLED, TEST = 140, 1000
PER_NODE = 18
TOPIC = 100  # words that are typical of a class
TYPICAL = 0.4  # share of a node's words that are drawn from those
ALIKE = 0.6  # share of edges within a class; 0.81 in Cora, whose other edges are less even


class GraphOptions(BaseModel):
    """Which graph; the data and the network of a recipe name the same one."""

    file: kdkit.RecipePath | None = Field(
        default=None,
        description=(
            "An npz or safetensors file of the graph: `features` (N, F) from 0 to 1, `labels` (N,),"
            " `edges` (2, E), and the nodes of the parts, `train` and `test` (default: a graph that"
            " is made)."
        ),
    )
    graph_seed: int = Field(default=0, ge=0, description="Gives the graph that is made.")
    inductive: bool = Field(
        default=False,
        description=(
            "Test nodes come after training: they read their neighbours, and no other node reads"
            " them."
        ),
    )


@dataclass(frozen=True)
class Graph:
    """A graph on the CPU.

    Attributes:
        features: uint8 (N, F); 255 stands for 1.
        labels: class of each node, int64 (N,).
        edges: int64 (2, E), from a node to one that reads it.
        train, test: numbers of the labelled nodes and of those to test on, int64.
        first: what the numbers in samples begin with; another one if test nodes come after
            training, so that a network that reads all edges is noticed.
    """

    features: Tensor
    labels: Tensor
    edges: Tensor
    train: Tensor
    test: Tensor
    first: int = 0

    @property
    def classes(self) -> int:
        """Number of classes; labels of nodes in neither part are not read."""
        return int(self.labels[torch.cat([self.train, self.test])].max()) + 1

    @property
    def codes(self) -> Tensor:
        """Bytes of all numbers, uint8 (N, 3)."""
        numbers = self.first + torch.arange(len(self.labels))[:, None]
        return (numbers // torch.tensor(CODE) % 256).to(torch.uint8)


def graph_of(options: GraphOptions) -> Graph:
    """Return the graph that the options name.

    Raises:
        DataError: the file is missing, damaged or no such graph.
    """
    # under a recipe's check, tensors would be made without numbers
    with torch.device("cpu"):
        found = made(options.graph_seed) if options.file is None else _read(options.file)
        if not options.inductive:
            return found
        late = torch.zeros(len(found.labels), dtype=torch.bool)
        late[found.test] = True
        source, reader = late[found.edges]
        kept = found.edges[:, ~(source & ~reader)]
        return replace(found, edges=kept, first=MOST)


def made(seed: int) -> Graph:
    """Make a contextual stochastic block model: words and edges tell a node's class, both with
    noise. Classes are as large as each other, and so are, but for chance, the nodes' degrees.
    """
    draw = numpy.random.default_rng(seed)
    labels = numpy.arange(NODES) % CLASSES
    topics = numpy.stack([draw.permutation(WORDS)[:TOPIC] for _ in range(CLASSES)])
    shape = (NODES, PER_NODE)
    typical = topics[labels[:, None], draw.integers(TOPIC, size=shape)]
    words = numpy.where(draw.random(shape) < TYPICAL, typical, draw.integers(WORDS, size=shape))
    features = numpy.zeros((NODES, WORDS), dtype=numpy.uint8)
    numpy.put_along_axis(features, words, 255, axis=1)
    ends = draw.integers(NODES, size=EDGES)
    other = (labels[ends] + draw.integers(1, CLASSES, size=EDGES)) % CLASSES
    wanted = numpy.where(draw.random(EDGES) < ALIKE, labels[ends], other)
    sizes = (NODES - 1 - wanted) // CLASSES + 1
    others = wanted + CLASSES * draw.integers(sizes)
    edges = torch.from_numpy(numpy.stack([ends, others]))
    numbers = torch.arange(NODES)
    return Graph(
        torch.from_numpy(features),
        torch.from_numpy(labels),
        both_ways(edges),
        numbers[:LABELLED],
        numbers[-TEST:],
    )


def both_ways(edges: Tensor) -> Tensor:
    """Return edges (2, E) in both directions, each once, without those of a node to itself."""
    whole: Tensor = torch.unique(torch.cat([edges, edges.flip(0)], 1), dim=1)
    return whole[:, whole[0] != whole[1]]


def _read(file: Path) -> Graph:
    def refuse(is_wrong: bool, says: str) -> None:
        if is_wrong:
            raise kdkit.DataError(f"{file.name}: {says}")

    refuse(not file.is_file(), f"there is no such file in {file.parent}")
    try:
        arrays = {name: array_file(file).read(name) for name in SHAPES}
    except kdkit.ModelError as error:
        raise kdkit.DataError(str(error)) from None
    for name, shape in SHAPES.items():
        array, whole = arrays[name], name != "features"
        refuse(
            array.ndim != len(shape) or not array.numel() or (name == "edges" and len(array) != 2),
            f"'{name}' has the shape {tuple(array.shape)}, not ({', '.join(shape)})",
        )
        # a mask is no list of numbers
        unlike = array.is_floating_point() or array.dtype == torch.bool
        refuse(
            array.is_complex() or (whole and unlike),
            f"'{name}' is {array.dtype}, not {'whole ' if whole else ''}numbers",
        )
        if whole:  # torch computes little with unsigned ones
            arrays[name] = array.long()
    features, labels, edges, train, test = (arrays[name] for name in SHAPES)
    nodes = len(features)
    least, most = float(features.min()), float(features.max())
    refuse(
        not 0 <= least <= most <= 1,
        f"'features' go from {least:g} to {most:g}; scale them to 0 to 1 (8 bits are kept)",
    )
    refuse(
        len(labels) != nodes or nodes > MOST,
        f"{nodes} nodes have 'features', {len(labels)} 'labels'; {MOST:,} at most",
    )
    for name in ("edges", "train", "test"):
        least, most = int(arrays[name].min()), int(arrays[name].max())
        refuse(
            not 0 <= least <= most < nodes,
            f"'{name}' names the nodes {least} to {most}, and there are {nodes}, counted from 0",
        )
    refuse(bool(torch.isin(test, train).any()), "'train' and 'test' have nodes in common")
    known = labels[torch.cat([train, test])]
    refuse(int(known.min()) < 0, "'labels' has a negative class of a node of 'train' or 'test'")
    refuse(
        int(known.max()) >= nodes,
        f"'labels' has class {int(known.max())}, counted from 0, and there are {nodes} nodes",
    )
    pixels = (features.double() * 255).round().to(torch.uint8)
    return Graph(pixels, labels, both_ways(edges), train, test)
