"""The part of a network behind one of its layers, as a function."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from kdkit.contracts.inputs import is_text, random_inputs
from kdkit.contracts.layers import BATCH_NORM, resolve
from kdkit.contracts.records import Outputs
from kdkit.errors import TapError
from kdkit.models.devices import device_of
from kdkit.models.freezing import in_eval_mode
from kdkit.models.tapped import TappedModel, has_channels_last

PROBE = 2  # images: some layers cannot take a single one


class Rest:
    """Computes what a network makes of values that stand in the place of a layer's own.

    The network runs on two images up to the layer, without gradient, and from there on with the
    given values: their gradient, and that of the network's parameters behind the layer, is the
    usual one. The statistics of batch normalisations do not change. No part of the network is
    copied.

    Args:
        model: the network, with the shape of its own input.
        layer: the layer whose values are given, named in any of the ways of a recipe.
        taps: layers behind it whose values are wanted too.

    Raises:
        TapError: there is no such layer; it is none that a value can be given to; the network reads
            something else from before it.
    """

    def __init__(self, model: TappedModel, layer: str, taps: Sequence[str] = ()) -> None:
        self._layer = resolve(layer, model.module)
        if self._layer.side != "output" or not self._layer.path:
            raise TapError(
                f"'{layer}': values are given in the place of a layer's output; name one"
            )
        if model.input_shape is None or is_text(model.input_shape):
            raise TapError(
                f"{model.role}: what stands behind '{layer}' is known for networks that take images"
                " of a known shape"
            )
        self._tapped, self._begins = (
            TappedModel(
                model.module,
                layers,
                role=model.role,
                precision=model.precision,
                input_shape=model.input_shape,
            )
            for layers in (taps, [layer])
        )
        images = random_inputs(model.input_shape, PROBE, device_of(model.module))
        assert isinstance(images, Tensor)
        weight = next((p for p in model.module.parameters() if p.is_floating_point()), images)
        # a network may have been converted to half precision
        self._images = images.to(weight.dtype)
        self._refuse_other_paths(layer)

    def __call__(self, values: Tensor) -> Outputs:
        """Return the logits, and the layers behind, of values in the form of the tapped layer."""
        with self._given(values), self._statistics_kept():
            return self._tapped(self._images).map(lambda x: x.to(values.dtype))

    @contextlib.contextmanager
    def _given(self, values: Tensor) -> Iterator[None]:
        """Replace the layer's output, so that the network effectively starts from there."""
        learning = torch.is_grad_enabled()

        def give(module: nn.Module, args: object, output: Tensor) -> Tensor:
            # gradients are on again from here
            torch.set_grad_enabled(learning)
            # taps show maps with channels last as (B, C, H, W)
            last = output.ndim == 4 and has_channels_last(output, self._images, network)
            return (values.permute(0, 2, 3, 1) if last else values).to(output.dtype)

        network = self._tapped.module
        handle = network.get_submodule(self._layer.path).register_forward_hook(give)
        try:
            torch.set_grad_enabled(False)
            yield
        finally:
            torch.set_grad_enabled(learning)
            handle.remove()

    @contextlib.contextmanager
    def _statistics_kept(self) -> Iterator[None]:
        """Let batch normalisations that are trained use the batch's statistics, and keep none."""
        norms = [
            norm
            for norm in self._tapped.module.modules()
            if isinstance(norm, BATCH_NORM) and norm.training and norm.track_running_stats
        ]
        try:
            for norm in norms:
                norm.track_running_stats = False
            yield
        finally:
            for norm in norms:
                norm.track_running_stats = True

    @torch.no_grad()
    def _refuse_other_paths(self, layer: str) -> None:
        """Check that the layer's own values give the network's own answer.

        Raises:
            TapError: they do not.
        """
        with in_eval_mode(self._tapped.module):
            values = self._begins(self._images).features[layer]
            whole = self._tapped(self._images)
            try:
                # in another order, which shows whatever goes past the layer
                part = self(values.flip(0)).map(lambda x: x.flip(0))
            # errors of the code behind the layer when it meets other values
            except (RuntimeError, ValueError, AssertionError, IndexError) as error:
                reason = " ".join(str(error).split())[:200]
                raise TapError(
                    f"{self._tapped.role}: cannot start at '{layer}': {reason}"
                ) from error
        pairs = [(whole.logits, part.logits)]
        pairs += [(f, part.features[name]) for name, f in whole.features.items()]
        for one, other in pairs:
            if not one.is_meta and not torch.allclose(one, other, rtol=1e-3, atol=1e-4):
                raise TapError(
                    f"{self._tapped.role}: what stands behind '{layer}' also reads what stands"
                    " before it, so that it cannot be computed from this layer; name another one"
                )
