"""The nodes of a graph, for students that read a node's features alone and teachers that also read
its neighbours'.

The graph that is made, where no file is named, is a contextual stochastic block model (Deshpande,
Sen, Montanari, Mossel, "Contextual Stochastic Block Models", NeurIPS 2018, arXiv:1807.09596) about
the size of Cora (Sen et al., "Collective Classification in Network Data", AI Magazine 2008), with
words in place of Gaussian features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

import kdkit

from ._graph import CODE, Graph, GraphOptions, graph_of


class GraphNodesOptions(GraphOptions, kdkit.DatasetOptions):
    """Which graph, and which of its nodes train."""

    nodes: Literal["labelled", "all"] = Field(
        default="labelled",
        description=(
            "Nodes of the training part. all: every node, without labels, but for test nodes if"
            " `inductive`; for losses that read a teacher alone, or for `data.unlabelled`."
        ),
    )


class GraphNodes(kdkit.DatasetSource):
    """Nodes of a graph, each a sample of two fields: `features`, (F, 1, 1), and `node`, its number
    for models that hold the graph, (3, 1, 1).

    The graph is read from a file, or made: 2,708 nodes of 7 classes with 500 words, 140 of them
    labelled and 1,000 for the test. Features are kept in 8 bits.
    """

    name = "graph_nodes"
    # `split` makes or reads the whole graph
    split_at_check = False
    Options = GraphNodesOptions
    options: GraphNodesOptions

    def info(self) -> kdkit.DataInfo:
        graph = self._graph
        words = graph.features.shape[1]
        return kdkit.DataInfo(
            (words + len(CODE), 1, 1),
            graph.classes,
            len(self._places("train")),
            len(graph.test),
            labelled=self.options.nodes == "labelled",
            fields={"features": words, "node": len(CODE)},
        )

    def own_files(self) -> Sequence[Path]:
        """The graph's file."""
        return [file] if (file := self.options.file) and file.is_file() else []

    def split(self, part: Literal["train", "test"]) -> kdkit.InMemory:
        graph, places = self._graph, self._places(part)
        samples = torch.cat([graph.features, graph.codes], 1)[places, :, None, None]
        return kdkit.InMemory(samples, graph.labels[places])

    def _places(self, part: Literal["train", "test"]) -> torch.Tensor:
        graph = self._graph
        if part == "test":
            return graph.test
        if self.options.nodes == "labelled":
            return graph.train
        every = torch.ones(len(graph.labels), dtype=torch.bool)
        every[graph.test] = not self.options.inductive
        return every.nonzero()[:, 0]

    @cached_property
    def _graph(self) -> Graph:
        return graph_of(self.options)


@kdkit.hookimpl
def kdkit_datasets() -> Sequence[type[kdkit.DatasetSource]]:
    """The dataset of this file."""
    return [GraphNodes]
