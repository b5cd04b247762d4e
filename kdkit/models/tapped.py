"""Models as kdkit calls them: inputs are adapted, and hooks observe layers."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdkit.contracts.inputs import Shape, answered, first_tensor
from kdkit.contracts.layers import Layer, expand, outputs_of, resolve
from kdkit.contracts.records import MASK, Inputs, Outputs
from kdkit.errors import ModelError, RunError, TapError
from kdkit.finite import FiniteAnswers
from kdkit.models.freezing import in_eval_mode
from kdkit.models.hooks import Keep, Stop, Store, Watch, observed, overwriter, register, version
from kdkit.models.outside import ask
from kdkit.models.seen import SeenInput
from kdkit.models.weight_files import adopt_shapes

Elsewhere = Callable[[Inputs, Sequence[str], bool], Outputs]
"""Answers inputs with these layers, and with logits or without."""
BEFORE = ", or, for the values before it, its input ('...@input')"


class TappedModel:
    """Calls a network and returns its Outputs, including those of the requested layers.

    It is no `nn.Module`, so `train` and `to` do not cascade to it. Hooks live for one call, and
    nothing is kept between calls. A layer that runs several times in a forward gives its last
    output. Maps with channels last, (B, H, W, C), as Swin transformers
    have them, are given as (B, C, H, W).

    Args:
        module: the network; it stays usable without this.
        layers: names as `kdkit.contracts.layers.resolve` takes them; they are the keys of
            `Outputs.features`.
        adapt: converts a batch to the network's input (None: unchanged).
        role: its name in messages, such as "teacher resnet18".
        outputs: number of logits, which helps to find the classifier of a network that does not
            say.
        needs_logits: False stops the forward behind the deepest tapped layer; the first call runs
            whole, to learn which that is.
        channels_last: keep network and images (B, C, H, W) channels-last in memory.
        precision: autocast to that type and return fp32; float32 switches autocast off; None leaves
            it to the caller.
        input_shape: shape of the network's own input, if known: images (C, H, W), or texts of at
            most N tokens (N,).
        sees: shape of what it sees of a sample, before that is adapted to the network, if known.

    Raises:
        TapError: there is no such layer.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Iterable[str] = (),
        *,
        adapt: nn.Module | None = None,
        role: str = "model",
        outputs: int | None = None,
        needs_logits: bool = True,
        channels_last: bool = False,
        precision: torch.dtype | None = None,
        input_shape: Shape | None = None,
        sees: Shape | None = None,
    ) -> None:
        self.module = module.to(memory_format=torch.channels_last) if channels_last else module
        self.adapt = adapt if adapt is not None else nn.Identity()
        self.role = role
        self.needs_logits = needs_logits
        self.channels_last = channels_last
        self.precision, self.input_shape = precision, input_shape
        self.sees = sees
        try:
            self.layers: dict[str, Layer] = {
                name: resolve(name, module, outputs) for name in layers
            }
        except TapError as error:
            raise TapError(f"{role}: {error}") from None
        # how often each tapped layer runs in a complete forward
        self._calls: Counter[str] | None = None
        self._store = Store()  # written by a compiled forward, emptied at its end
        self._compile: dict[str, Any] | None = None
        self._compiled: Callable[[Inputs], tuple[Tensor | None, dict[str, Tensor]]] | None = None
        self._hooked = False
        self._settled: nn.Module | None = None
        self._is_view = False  # a view's owner checks its answers itself
        self.frozen = False
        # answers of a frozen model: nothing else would detect NaN in them
        self.finite = FiniteAnswers(role)
        # replaces the forward if answers come from elsewhere, such as a cache
        self.answers: Callable[[Inputs], Outputs] | None = None
        # answers in the network's place, also where it is measured: another process has it
        self.elsewhere: Elsewhere | None = None

    def __call__(self, inputs: Inputs) -> Outputs:
        """Answer a batch (B, C, H, W), or a mapping whose items become keyword arguments.

        Raises:
            TapError: a tapped layer did not run, returned something else than one tensor, or was
                overwritten in place.
        """
        # no loss reads anything: the forward is saved
        if not self.needs_logits and not self.layers:
            return features_only({}, self.role, mask_of(inputs))
        answer = self.forward(inputs) if self.answers is None else ask(self.answers, inputs)
        # recorded on the device; `verify_finite` reads it later
        if self.frozen and not self._is_view:
            logits = {"logits": answer.logits} if self.needs_logits else {}
            self.finite.note({**logits, **answer.features})
        return answer

    def forward(self, inputs: Inputs) -> Outputs:
        """Answer by a forward of the network, even if `answers` is replaced."""
        if self.elsewhere is not None:
            return self.elsewhere(inputs, [*self.layers], self.needs_logits)
        try:
            with self._autocast(inputs):
                logits, features = (
                    self._run_compiled(inputs) if self._compile is not None else self._run(inputs)
                )
        # name a wrong input size, the usual reason, before torch's own message
        except RuntimeError as error:
            if self.input_shape is None or not isinstance(inputs, Tensor):
                raise
            if (shape := tuple(self.adapt(inputs).shape[1:])) == self.input_shape:
                raise
            takes, got = (f"(B, {', '.join(map(str, s))})" for s in (self.input_shape, shape))
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"{self.role}: takes images {takes}, got {got}: {reason}") from error
        # an embedding is asked for a token or position that it does not have
        except IndexError as error:
            if isinstance(inputs, Tensor):
                raise
            raise ModelError(
                f"{self.role}: has fewer tokens or positions than these texts ({error}); is the"
                " tokenizer its own?"
            ) from error
        # losses and caches expect fp32
        if self.precision is not None:
            logits = logits.float() if logits is not None else None
            features = {name: value.float() for name, value in features.items()}
        mask = mask_of(inputs)
        if logits is None:
            return features_only(features, self.role, mask)
        return Outputs(logits, features, mask=mask)

    def settle(self, network: nn.Module) -> None:
        """Set the network that replaces this one after its stage: itself, an average, a whole."""
        self._settled = None if network is self.module else network

    def freeze(self, mode: Literal["eval", "train"] = "eval") -> TappedModel:
        """Put it in eval mode without gradients for good, with a finished stage's averages if any.

        Args:
            mode: train normalises with each batch's own statistics in BatchNorm layers; their
                buffers do not change, and all other layers (dropout) stay in eval mode.

        Raises:
            RunError: a loss has put another network in its place, which has other layers.
        """
        if self._settled is not None:
            # an average has the same class, and weights by the same names
            if type(self._settled) is not type(self.module):
                whole = type(self._settled).__name__
                raise RunError(
                    f"{self.role}: a loss has made it a part of another network, {whole}, so that"
                    " it cannot teach on its own"
                )
            adopt_shapes(self.module, self._settled.state_dict())
            self.module.load_state_dict(self._settled.state_dict())
            self._settled = None
        self.frozen = True
        self.module.eval().requires_grad_(False)
        for layer in self.module.modules():
            if mode == "train" and isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.train()
                # so that running statistics are neither read nor written
                layer.track_running_stats = False
        return self

    def twin(self, module: nn.Module | None = None, layers: Iterable[str] = ()) -> TappedModel:
        """Return the model without taps, for measuring or export, with others, or around another
        network.
        """
        other = TappedModel(
            self.module if module is None else module,
            layers,
            adapt=self.adapt,
            role=self.role,
            channels_last=self.channels_last,
            precision=self.precision,
            input_shape=self.input_shape,
            sees=self.sees,
        )
        other.elsewhere = self.elsewhere if module is None else None
        return other

    def view(
        self,
        layers: Iterable[str],
        *,
        needs_logits: bool,
        answers: Callable[[Inputs], Outputs] | None,
    ) -> TappedModel:
        """Return a view of the network with some of its taps and another source of answers."""
        # shallow: the network is shared
        other = copy.copy(self)
        other._is_view = True
        other.layers = {name: self.layers[name] for name in layers}
        other.needs_logits = needs_logits
        other.answers = answers
        return other

    def compile(self, **options: Any) -> TappedModel:
        """Compile network and taps by `torch.compile`; a first, plain call checks the taps."""
        self._compile, self._compiled = options, None
        return self

    @property
    def compiled(self) -> bool:
        """True if calls run compiled code, which hooks that are added later do not reach."""
        return self._compile is not None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out compiled code, which is bound to this network: a copy compiles its own."""
        return {**self.__dict__, "_compiled": None}

    def outputs(self, inputs: Inputs) -> list[Tensor]:
        """Return all outputs of the network for a batch, the logits first.

        Raises:
            TapError: it returns no tensor of logits.
        """
        adapted = self._adapted(inputs)
        # after the adapter, whose operations may return another layout
        if self.channels_last and isinstance(adapted, Tensor) and adapted.ndim == 4:
            adapted = adapted.contiguous(memory_format=torch.channels_last)
        returned = answered(self.module, adapted)
        if not (outputs := outputs_of(returned)):
            raise TapError(
                f"{self.role}: returns {type(returned).__name__}, no tensor of logits, nor several"
                " that begin with one"
            )
        return outputs

    def _adapted(self, inputs: Inputs) -> Inputs:
        # only what is trained, or teaches: what is measured is a twin, which is not frozen
        drawing = self.module.training or self.frozen
        if drawing and isinstance(self.adapt, SeenInput):
            return self.adapt.forward(inputs, drawing=True)
        adapted: Inputs = self.adapt(inputs)
        return adapted

    def _forward(self, inputs: Inputs) -> Tensor:
        return self.outputs(inputs)[0]

    def _run(self, inputs: Inputs) -> tuple[Tensor | None, dict[str, Tensor]]:
        watch = Watch(self.role, None if self.needs_logits else self._calls)
        with observed(self.module, self.layers, watch.keep), contextlib.suppress(Stop):
            whole = self._forward(inputs)
            # reached only if no `Stop` ended the forward: a complete forward counts the calls
            self._calls = watch.calls
        if silent := self.layers.keys() - watch.kept.keys():
            raise TapError(
                f"{self.role}: {', '.join(sorted(silent))} exist but did not run in forward()"
            )
        for name, tensor in watch.kept.items():
            if watch.versions[name] != version(tensor):
                again = functools.partial(self._forward, inputs)
                instead = overwriter(self.module, self.layers[name], again)
                raise TapError(
                    f"{self.role}: the output of '{name}' is overwritten in place; tap {instead}"
                    f" instead{BEFORE}"
                )
        features = {name: self._shaped(name, watch.kept[name], inputs) for name in self.layers}
        return (whole if self.needs_logits else None), features

    def _run_compiled(self, inputs: Inputs) -> tuple[Tensor | None, dict[str, Tensor]]:
        if self._compiled is None:
            self._check(inputs)
            # once: a copy, or a second `compile`, has the hooks already
            if not self._hooked:
                register(self.module, self.layers, functools.partial(Keep, store=self._store))
                self._hooked = True
            # networks of one architecture share compiled graphs
            self._compiled = torch.compile(self._collect, **(self._compile or {}))
        self._store.open = True
        try:
            return self._compiled(inputs)
        finally:
            self._store.open = False

    def _collect(self, inputs: Inputs) -> tuple[Tensor | None, dict[str, Tensor]]:
        logits = self._forward(inputs)
        features = {
            name: self._shaped(name, self._store.values[name], inputs) for name in self.layers
        }
        self._store.values.clear()
        # the compiler removes outputs that are not read
        return (logits if self.needs_logits else None), features

    def _check(self, inputs: Inputs) -> None:
        """Run one plain forward, as a compiled one cannot detect what happened to a tensor."""
        # eval mode, so that the check does not change running statistics
        with in_eval_mode(self.module), torch.no_grad():
            self._run(inputs)

    def _autocast(self, inputs: Inputs) -> contextlib.AbstractContextManager[Any]:
        tensor = first_tensor(inputs)
        if self.precision is None or tensor.device.type == "meta":  # shapes have no precision
            return contextlib.nullcontext()
        # fp32 switches off an autocast around the call, such as the student's
        off = self.precision == torch.float32
        return torch.autocast(
            tensor.device.type, dtype=None if off else self.precision, enabled=not off
        )

    def _shaped(self, name: str, tensor: Tensor, inputs: Inputs) -> Tensor:
        if tensor.ndim == 4 and has_channels_last(tensor, inputs, self.module):
            return tensor.permute(0, 3, 1, 2)
        if not self.layers[name].embedding or tensor.ndim == 2:
            return tensor
        # (B, D, 1, 1) or (B, 1, D), as some classifiers take it
        embedding = tensor.flatten(1)
        if tensor.ndim < 2 or embedding.shape[1] != max(tensor.shape[1:]):
            raise TapError(
                f"{self.role}: '{name}' is no embedding (B, D) but {tuple(tensor.shape)}; name a"
                " layer instead"
            )
        return embedding


def mask_of(inputs: Inputs) -> Tensor | None:
    """Return which tokens of texts are real; None for images."""
    return inputs[MASK].bool() if isinstance(inputs, Mapping) and MASK in inputs else None


def has_channels_last(f: Tensor, inputs: Inputs, module: nn.Module) -> bool:
    """Check whether a map is (B, H, W, C): timm's networks declare it, equal sides reveal it."""
    declared = getattr(module, "output_fmt", None)
    if declared is not None:
        return str(getattr(declared, "value", declared)) == "NHWC"
    square = isinstance(inputs, Tensor) and inputs.ndim == 4 and inputs.shape[2] == inputs.shape[3]
    return square and f.shape[1] == f.shape[2] != f.shape[3]


def features_only(features: Mapping[str, Tensor], role: str, mask: Tensor | None = None) -> Outputs:
    """Return an answer that stops at the deepest tap: reading its logits raises a TapError."""
    says = (
        f"{role}: stops at its deepest tapped layer, no loss having asked for its logits; a loss"
        " that reads them sets `needs_teacher_logits = True` (a teacher without the data's classes"
        " has none)"
    )
    return Outputs.lacking(TapError(says), features=features, views={}, mask=mask)


def taps(model: nn.Module, layers: Iterable[str]) -> TappedModel:
    """Observe layers of any network: call it for `logits` and `features[name]`.

    The batch reaches the network unchanged. Globs are expanded, so that `blocks.*` gives
    `features["blocks.0"]` and so on.

    Raises:
        TapError: there is no such layer.
    """
    return TappedModel(
        model,
        [name for pattern in layers for name in expand(pattern, model)],
        role=type(model).__name__,
    )
