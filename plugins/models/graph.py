"""Graph networks, which hold a graph and answer for its nodes (extra `graph`).

Fey, Lenssen, "Fast Graph Representation Learning with PyTorch Geometric", arXiv:1903.02428, has
the layers. `sage`: Hamilton, Ying, Leskovec, "Inductive Representation Learning on Large Graphs",
NeurIPS 2017, arXiv:1706.02216, with means over all neighbours. `gat`: Velickovic et al., "Graph
Attention Networks", ICLR 2018, arXiv:1710.10903.

As the teacher of a perceptron on the nodes' features: Zhang, Liu, Sun, Shah, "Graph-less Neural
Networks", ICLR 2022, arXiv:2110.08727.
"""

import warnings
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

import kdkit

from ..datasets._graph import CODE, Graph, GraphOptions, graph_of

KINDS = {"gat": "GAT", "sage": "GraphSAGE"}
ROUNDING = 1e-3  # of a byte that was divided by 255


class GraphNetwork(nn.Module):
    """A network of PyTorch Geometric, and the graph that it reads.

    Of a batch it computes the neighbourhood alone, as many steps around the nodes as it has
    layers, whose outputs therefore have a row for each node of that.
    """

    features: Tensor
    edges: Tensor

    def __init__(self, network: nn.Module, layers: int, graph: Graph) -> None:
        super().__init__()
        self.network = network
        self.layers = layers
        self.first = graph.first
        # not persistent: they are the file's
        self.register_buffer("features", torch.as_tensor(graph.features) / 255, persistent=False)
        self.register_buffer("edges", torch.as_tensor(graph.edges), persistent=False)

    def forward(self, samples: Tensor) -> Tensor:
        """Logits (B, K) of nodes, given as (B, F + 3, 1, 1): features and number.

        Raises:
            ModelError: samples are not nodes of this graph.
        """
        from torch_geometric.utils import k_hop_subgraph

        around, edges, places, _ = k_hop_subgraph(
            self._numbers(samples.flatten(1)),
            self.layers,
            self.edges,
            relabel_nodes=True,
            num_nodes=len(self.features),
        )
        logits: Tensor = self.network(self.features[around], edges)
        return logits[places]

    def _numbers(self, samples: Tensor) -> Tensor:
        words = self.features.shape[1]
        own, code = samples[:, :words], samples[:, words:] * 255
        number = (code.round().long() * torch.tensor(CODE, device=code.device)).sum(1) - self.first
        node: Tensor = number % len(self.features)
        # what is no bytes was drawn to try the network
        real = ((code - code.round()).abs() < ROUNDING).all(1)
        # devices divide by 255 in other ways
        others = (own * 255 - self.features[node] * 255).abs() > ROUNDING
        if bool((real & ((number != node) | others.any(1))).any()):
            raise kdkit.ModelError(
                "a sample is no node of this graph: data and network must name the same `file`,"
                " `graph_seed` and `inductive`, and nodes are neither mixed nor augmented"
            )
        return node


class GraphSource(kdkit.ModelSource):
    """Graph networks: `model: graph/sage` or `graph/gat`. They hold the graph, whose nodes the
    dataset `graph_nodes` gives.
    """

    name = "graph"

    class Options(GraphOptions, kdkit.ModelOptions):
        """Which graph, and what the network is."""

        hidden: int = Field(default=128, gt=0, le=65_536, description="Width of hidden layers.")
        layers: int = Field(
            default=2, gt=0, le=16, description="Layers: how many steps it sees around a node."
        )
        dropout: float = Field(
            default=0.5, ge=0, lt=1, description="Share of units dropped between the layers."
        )

        @model_validator(mode="after")
        def _numbers_as_they_are(self) -> Self:
            if self.normalize is not None:
                raise ValueError("normalize: would change the numbers of the nodes; leave it out")
            return self

    options: Options

    def build(self, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        """A network of PyTorch Geometric, with the graph."""
        if self.model_name not in KINDS:
            raise kdkit.ModelError(
                f"'{self.model_name}' is no graph network; there are {', '.join(KINDS)}"
            )
        if num_classes == 0:
            raise kdkit.ModelError("a graph network without classes is not supported")
        options = self.options
        try:
            graph = graph_of(options)
        except kdkit.DataError as error:
            raise kdkit.ModelError(str(error)) from None
        words = graph.features.shape[1]
        if image_shape != (words + len(CODE), 1, 1):
            raise kdkit.ModelError(
                f"the graph's nodes have {words} features, which with their number are samples of"
                f" shape {(words + len(CODE), 1, 1)}; the samples are {tuple(image_shape)}: see"
                " `file` here and of dataset `graph_nodes`"
            )
        network: nn.Module = getattr(_geometric(), KINDS[self.model_name])(
            words, options.hidden, options.layers, num_classes, dropout=options.dropout
        )
        return GraphNetwork(network, options.layers, graph)


def _geometric() -> object:
    try:
        with warnings.catch_warnings():
            # it uses what newer versions of torch have deprecated
            warnings.simplefilter("ignore")
            import torch_geometric.nn
    except ImportError:
        raise kdkit.ModelError(
            "graph networks need torch-geometric: pip install 'kdkit[graph]'"
        ) from None
    found: object = torch_geometric.nn
    return found


@kdkit.hookimpl
def kdkit_models() -> list[type[kdkit.ModelSource]]:
    return [GraphSource]
