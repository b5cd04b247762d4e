"""Quantisation: the student that is deployed computes with integers of 8 bits.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", CVPR 2018, arXiv:1712.05877, by torchao's PT2E flow. With a teacher of full precision it
is the quantisation-aware distillation of Mishra, Marr, "Apprentice", ICLR 2018, arXiv:1711.05852.
"""

import copy
import importlib.util
import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, fx, nn

import kdkit

from ._exported import FOLDED, exported, shown_to_hooks, without_calls
from ._scaled import folded, scales_of, unfold

TOLERANCE = 1e-4  # between the network and its graph in fp32, relative to the largest answer


class Quantize(kdkit.Compression):
    """Deploys an int8 network: weights of 8 bits per output channel, activations of 8 bits per
    tensor.

    With `aware`, training sees the rounding: weights and activations are fake-quantised, with the
    straight-through gradient, and ranges of activations are moving averages. Batch norms are
    folded: weights and biases learn as before, while statistics and gamma stay as they are. So the
    network should begin with trained weights (`init`, `checkpoint`).
    Without, the float network is trained, and quantised whenever it is measured: ranges then come
    from `calibration` batches of training images. In both cases scores, files and exports are those
    of the int8 network. Needs `pip install kdkit[quantize]`.
    """

    name = "quantize"
    order = 1
    on_cpu_only = True

    class Options(kdkit.CompressionOptions):
        """To what, and when."""

        to: Literal["int8"] = Field(default="int8", description="Type of the deployed network.")
        aware: bool = Field(
            default=True,
            description="Train with fake quantisation; false: quantise after training.",
        )
        calibration: int = Field(
            default=8, gt=0, le=10_000, description="Batches for the ranges, if not `aware`."
        )

    options: Options

    @classmethod
    def refused(cls, options: Any, train: Mapping[str, Any]) -> dict[str, str]:
        if train["precision"] != "fp32":
            return {
                "": f"fake quantisation is in fp32, not `train.precision: {train['precision']}`"
            }
        if train["compile"]:
            return {"": "its graph is exported already; leave `train.compile` out"}
        return {}

    def begin(self, network: nn.Module, images: Tensor) -> nn.Module:
        _require_torchao()
        if not self.options.aware:
            return network
        wanted = _answer(network, images)
        graph, calls = exported(network, images)
        scales = scales_of(graph)
        prepared = _prepared(graph, aware=True)
        unfold(prepared, scales)
        made = shown_to_hooks(network, prepared, calls)
        for observer in _observers(made):
            observer.register_forward_pre_hook(_watch_in_training)
        _begin_ranges(made, images, wanted)
        return made

    def finish(self, network: nn.Module, samples: kdkit.Samples) -> nn.Module:
        _require_torchao()
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

        if self.options.aware:
            assert isinstance(network, fx.GraphModule)
            prepared = folded(without_calls(network))
            # no batch so far, where the structure alone is wanted
            if not all(_has_range(observer) for observer in _observers(prepared)):
                prepared.train()
                for images in samples(1):
                    prepared(images)
        else:
            batches = list(samples(self.options.calibration))
            # a single image would be taken for a batch of a fixed size
            graph, _ = exported(copy.deepcopy(network), torch.cat([batches[0]] * 2)[:2])
            prepared = _prepared(graph, aware=False)
            with torch.no_grad():
                for images in batches:
                    prepared(images)
        with torch.no_grad():
            return Int8.of(convert_pt2e(prepared))


def _require_torchao() -> None:
    if importlib.util.find_spec("torchao") is None:
        raise kdkit.ModelError("quantize needs torchao: pip install kdkit[quantize]")
    # what torchao does to torch while it is imported concerns nobody here
    logger = logging.getLogger("torch.utils._pytree")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        importlib.import_module("torchao")
    finally:
        logger.setLevel(before)


def _prepared(graph: fx.GraphModule, *, aware: bool) -> fx.GraphModule:
    """Fold batch norms and put observers, or fake quantisation, into an exported graph."""
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    folded = graph.meta[FOLDED]
    config = x86.get_default_x86_inductor_quantization_config(is_qat=aware)
    # not `prepare_qat_pt2e`, which would simulate the folding: it takes a hundred times longer
    prepared: fx.GraphModule = prepare_pt2e(graph, x86.X86InductorQuantizer().set_global(config))
    prepared.meta[FOLDED] = folded
    return prepared


def _watch_in_training(observer: Any, _: Any) -> None:
    observer.observer_enabled.fill_(observer.training)


def _answer(network: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        answer: Tensor = network.eval()(images)
    return answer


def _observers(network: nn.Module) -> list[Any]:
    return [layer for layer in network.modules() if hasattr(layer, "observer_enabled")]


def _has_range(observer: Any) -> bool:
    return bool(observer.activation_post_process.min_val.isfinite().all())


def _begin_ranges(network: nn.Module, images: Tensor, wanted: Tensor) -> None:
    """Let each observer see one batch, and then forget its range.

    Raises:
        ModelError: without rounding, the graph gives another answer than the network.
    """
    observers = _observers(network.train())
    with torch.no_grad():
        for rounding in (False, True):
            for observer in observers:
                observer.fake_quant_enabled.fill_(rounding)
            found = network(images)
            if not rounding and not torch.allclose(
                found, wanted, rtol=TOLERANCE, atol=TOLERANCE * float(wanted.abs().max())
            ):
                gap = float((found - wanted).abs().max())
                raise kdkit.ModelError(f"quantize: exporting changes the answers by {gap:.1g}")
    for observer in observers:
        _forget(observer)


def _forget(observer: Any) -> None:
    """Let the range of activations begin with the next batch; one of weights is known."""
    watched = observer.activation_post_process
    if watched.min_val.ndim == 0:
        watched.min_val.fill_(torch.inf)
        watched.max_val.fill_(-torch.inf)


class Int8(fx.GraphModule):
    """A converted network. Scales and zero points of activations, which are numbers in the code of
    its graph, are tensors of its file: (N,), in the order of the code.
    """

    @classmethod
    def of(cls, converted: fx.GraphModule) -> "Int8":
        made = cls(converted, converted.graph)
        scales, zero_points = zip(*(node.args[1:3] for node in made._rounding()), strict=True)
        made.register_buffer("activation_scales", torch.tensor(scales))
        made.register_buffer("activation_zero_points", torch.tensor(zero_points))
        return made

    activation_scales: Tensor
    activation_zero_points: Tensor

    def _rounding(self) -> list[fx.Node]:
        ops = torch.ops.quantized_decomposed
        forms = (ops.quantize_per_tensor.default, ops.dequantize_per_tensor.default)
        return [node for node in self.graph.nodes if node.target in forms]

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        read = (self.activation_scales.tolist(), self.activation_zero_points.tolist())
        for node, scale, zero_point in zip(self._rounding(), *read, strict=True):
            node.args = (node.args[0], scale, zero_point, *node.args[3:])
        self.recompile()

    # what no node of the graph names would be left behind
    def __deepcopy__(self, memo: dict[int, Any]) -> "Int8":
        return Int8.of(super().__deepcopy__(memo))


@kdkit.hookimpl
def kdkit_compressions() -> list[type[kdkit.Compression]]:
    return [Quantize]
