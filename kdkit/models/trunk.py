"""Several networks of one architecture with a common trunk, which is computed only once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kdkit.contracts.features import as_vectors
from kdkit.contracts.inputs import Shape, answered, is_text, random_inputs
from kdkit.contracts.layers import Layer, output_of, resolve
from kdkit.contracts.records import Inputs, Outputs
from kdkit.contracts.schedule import Model
from kdkit.errors import TapError
from kdkit.models.devices import device_of
from kdkit.models.freezing import in_eval_mode
from kdkit.models.tapped import TappedModel

PROBE = 3  # images


class Trunk:
    """Makes students share all up to and including a layer; a call gives all answers.

    The parameters and buffers that the first student's layer depends on replace those of the other
    students. Each student stays a complete network, with all of its names, and can be measured,
    averaged and exported alone.

    A call runs the first student normally. Every other student runs on one image up to the layer,
    in eval mode and without gradient, and from there on with the first student's output for the
    whole batch. If that does not give the answer of the whole network (code after the layer reads
    something from before it), for texts and for compiled networks, every student runs completely:
    `once` tells which case applies.

    Args:
        students: fresh students of one architecture.
        layer: the last layer of the trunk, named in any of the ways of a recipe.

    Raises:
        TapError: there is no such layer, it does not give one tensor, or no learnable part follows
            it.
    """

    def __init__(self, students: Sequence[Model], layer: str) -> None:
        self.students = [_tapped(student) for student in students]
        first = self.students[0]
        self.last = resolve(layer, first.module)
        if self.last.side != "output" or not self.last.path:
            raise TapError(f"'{layer}': a trunk ends behind a layer of the network; name one")
        self.layer = layer
        first.layers.setdefault(layer, self.last)
        with in_eval_mode(*(student.module for student in self.students)):
            shape = _input_shape(first)
            images = random_inputs(shape, PROBE, device_of(first.module))
            self._began, self._ended, features, shared = _extent(
                first.module, self.last.path, images, layer
            )
            for student in self.students[1:]:
                _share(first.module, student.module, shared, self._began)
            if all(
                name in shared for name, _ in first.module.named_parameters(remove_duplicate=False)
            ):
                raise TapError(
                    f"'{layer}': nothing that learns lies behind it; end the trunk earlier"
                )
            # with one text, the network would get only that text's mask
            whole = is_text(shape) or any(student.compiled for student in self.students)
            self.once = not whole and self._agrees(images, features)

    def __call__(self, inputs: Inputs) -> tuple[Tensor, list[Outputs]]:
        """Return the output of the trunk, and each student's answer."""
        first, *others = self.students
        outputs: list[Tensor] = []
        # not from `features`, whose form may be another than the one that the next module takes
        handle = first.module.get_submodule(self.last.path).register_forward_hook(
            lambda module, args, output: outputs.append(output)
        )
        try:
            answer = first(inputs)
        finally:
            handle.remove()
        return answer.features[self.layer], [
            answer,
            *(self._answer(other, inputs, outputs[-1:], answer) for other in others),
        ]

    def _answer(
        self, student: TappedModel, inputs: Inputs, trunk: Sequence[Tensor], first: Outputs
    ) -> Outputs:
        if not self.once:
            return student(inputs)
        assert isinstance(inputs, Tensor)
        # one image, because the network runs up to the layer all the same
        with self._from_layer(student.module, trunk[0]):
            answer = student(inputs[:1])
        # what was tapped before the layer saw one image only
        early = {name for name, layer in student.layers.items() if self._is_early(layer)}
        return replace(
            answer,
            features={
                name: first.features[name] if name in early else f
                for name, f in answer.features.items()
            },
        )

    def _is_early(self, layer: Layer) -> bool:
        return layer.path in (self._ended if layer.side == "output" else self._began)

    @contextlib.contextmanager
    def _from_layer(self, network: nn.Module, features: Tensor) -> Iterator[None]:
        """Replace the trunk's output, so that the network effectively starts from there."""
        learning = torch.is_grad_enabled()

        # a hook's return value replaces the output; gradients are on again from here
        def give(module: nn.Module, args: object, output: object) -> Tensor:
            torch.set_grad_enabled(learning)
            return features

        # BatchNorms of the trunk must not count the single image in their statistics
        resting = [
            module
            for path, module in network.named_modules()
            if path in self._ended and module.training
        ]
        handle = network.get_submodule(self.last.path).register_forward_hook(give)
        for module in resting:
            module.training = False
        try:
            torch.set_grad_enabled(False)
            yield
        finally:
            torch.set_grad_enabled(learning)
            handle.remove()
            for module in resting:
                module.training = True

    @torch.no_grad()
    def _agrees(self, images: Inputs, features: Tensor) -> bool:
        """Check whether starting from the trunk's output gives the whole network's answer."""
        network = self.students[-1].module
        assert isinstance(images, Tensor)
        whole = _logits(network(images))
        try:
            with self._from_layer(network, features):
                short = _logits(network(images[:1]))
        # errors of the code behind the layer when one image meets a whole batch
        except (RuntimeError, ValueError, AssertionError, IndexError):
            return False
        return whole.shape == short.shape and (
            whole.is_meta or torch.allclose(whole, short, rtol=1e-4, atol=1e-5)
        )


def channels(student: Model, layer: str) -> int:
    """Return the channels of a student's layer, or its vectors' length, by running it."""
    model = _tapped(student)
    probe = TappedModel(model.module, input_shape=model.input_shape)
    probe.layers = {layer: model.layers[layer]}
    images = random_inputs(_input_shape(model), 1, device_of(model.module))
    with in_eval_mode(model.module), torch.no_grad():
        return as_vectors(probe(images).features[layer]).shape[1]


def _extent(
    network: nn.Module, path: str, images: Inputs, layer: str
) -> tuple[set[str], set[str], Tensor, set[str]]:
    """Find what belongs to a layer's output.

    Returns:
        The modules that begin before it is returned, those that end before; the output; the
        parameters that it depends on.
    """
    began: set[str] = set()
    ended: set[str] = set()
    outputs: list[Any] = []

    def starts(name: str) -> Callable[..., None]:
        return lambda module, args: None if outputs else began.add(name)

    def ends(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            if not outputs:
                ended.add(name)
            if name == path:
                outputs.append(output)

        return hook

    named = dict(network.named_modules())
    handles = [module.register_forward_pre_hook(starts(name)) for name, module in named.items()]
    handles += [module.register_forward_hook(ends(name)) for name, module in named.items()]
    # autograd tells what the output depends on, so frozen parameters have to be part of the graph
    parameters = {id(p): p for p in network.parameters() if p.is_floating_point()}
    constant = [p for p in parameters.values() if not p.requires_grad]
    try:
        with torch.enable_grad():
            for parameter in constant:
                parameter.requires_grad_(True)
            answered(network, images)
            if len(outputs) != 1 or not isinstance(outputs[0], Tensor):
                raise TapError(
                    f"'{layer}' runs {len(outputs)} times or does not give one tensor; a trunk ends"
                    " behind a layer that does"
                )
            slopes = torch.autograd.grad(
                outputs[0].sum(), list(parameters.values()), allow_unused=True
            )
    finally:
        for handle in handles:
            handle.remove()
        for parameter in constant:
            parameter.requires_grad_(False)
    reached = {key for key, slope in zip(parameters, slopes, strict=True) if slope is not None}
    shared = {
        name for name, p in network.named_parameters(remove_duplicate=False) if id(p) in reached
    }
    # detached: the graph would keep every activation of the probe alive
    return began, ended, outputs[0].detach(), shared


def _share(source: nn.Module, target: nn.Module, parameters: set[str], modules: set[str]) -> None:
    """Replace parameters and buffers of one network by those of another."""
    for path, module in source.named_modules():
        other, prefix = target.get_submodule(path), f"{path}." if path else ""
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if f"{prefix}{name}" in parameters:
                setattr(other, name, parameter)
        # nothing tells what a buffer affects; those of modules that run before the end are shared
        if path in modules:
            for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
                setattr(other, name, buffer)


def _tapped(student: Model) -> TappedModel:
    assert isinstance(student, TappedModel), "students come from kdkit.Models"
    return student


def _input_shape(model: TappedModel) -> Shape:
    if model.input_shape is None:
        raise TapError(f"{model.role}: the shape of its images is not known")
    return model.input_shape


def _logits(output: object) -> Tensor:
    logits = output_of(output, 0)
    assert isinstance(logits, Tensor)
    return logits
