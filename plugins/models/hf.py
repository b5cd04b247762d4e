"""Text classifiers and causal language models of Hugging Face transformers (extra `text`).

Wolf et al., "Transformers: State-of-the-Art Natural Language Processing", EMNLP 2020 demos,
arXiv:1910.03771. `AutoModelForSequenceClassification` builds classifiers, an encoder and a
classifier on its pooled answer; `AutoModelForCausalLM` what says the next token. Layers have
the paths of `named_modules()`, such as `bert.encoder.layer.3`.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from torch import nn

import kdkit

from ..datasets._text.tokens import digest_of

# Said to every loader of the library, whatever a folder or the hub says: no Python that comes with
# a network runs. Left out, it asks on the terminal.
OWN_CODE_ONLY = {"trust_remote_code": False}

HEADS = {
    "classes": "AutoModelForSequenceClassification",
    "language_model": "AutoModelForCausalLM",
}

# How DistilBERT calls what BERT calls otherwise, so that it can begin with BERT's layers (Sanh et
# al. 2019, arXiv:1910.01108, section 3).
DISTILBERT = (
    (r"^bert\.encoder\.", "distilbert.transformer."),
    (r"^bert\.", "distilbert."),
    (r"\.attention\.self\.(query|key|value)\.", lambda found: f".attention.{found[1][0]}_lin."),
    (r"\.attention\.output\.dense\.", ".attention.out_lin."),
    (r"\.attention\.output\.LayerNorm\.", ".sa_layer_norm."),
    (r"\.intermediate\.dense\.", ".ffn.lin1."),
    (r"(layer\.\d+)\.output\.dense\.", r"\1.ffn.lin2."),
    (r"(layer\.\d+)\.output\.LayerNorm\.", r"\1.output_layer_norm."),
)


def _beside_its_file(value: Any) -> Any:
    """A folder (`hf/./NAME`, `hf/../NAME`) is meant from the file in which it is written."""
    source, _, name = str(value).partition("/")
    folder = getattr(value, "folder", None)
    if folder is None or not name.startswith((".", "~")):
        return value
    return f"{source}/{(folder / Path(name).expanduser()).resolve()}"


class HuggingFaceSource(kdkit.ModelSource):
    """Text classifiers of transformers: `model: hf/bert-base-uncased`, a local folder
    (`hf/./folder`), or a `config` alone. With `head: language_model`, causal language models.
    """

    name = "hf"
    takes = "texts"

    class Options(kdkit.ModelOptions):
        """Where the weights come from, and what the network is."""

        model: Annotated[str, BeforeValidator(_beside_its_file)] = Field(
            description=(
                "hf/NAME, as the hub has it, or hf/FOLDER: a path that begins with `.` is relative"
                " to this file."
            )
        )
        pretrained: bool = Field(
            default=True,
            description=(
                "Begin with NAME's weights (downloaded once); a classifier that it has not stays"
                " random."
            ),
        )
        head: Literal["classes", "language_model"] = Field(
            default="classes",
            description=(
                "What it says: one class of a text, or the next token behind each token (for `task:"
                " language_model`), as many as the tokenizer has: where an embedding is padded to"
                " more, the others are left out."
            ),
        )
        config: kdkit.NetworkArguments = Field(
            default_factory=dict,
            description=(
                "What the network is, in the place of NAME's own: `model_type` (bert,"
                " distilbert...) and what differs from its defaults, such as `num_hidden_layers:"
                " 3`. Without `model_type`: what differs from NAME's own."
            ),
        )

    options: Options

    def build(self, num_classes: int, image_shape: tuple[int]) -> nn.Module:
        """The network with random weights."""
        with self._asking("built") as transformers:
            config = self._config(transformers, num_classes)
            network: nn.Module = self._class(transformers).from_config(config, **OWN_CODE_ONLY)
        if (most := _positions(config)) is not None and image_shape[0] > most:
            raise kdkit.ModelError(
                f"reads {most} tokens at most, and texts have up to {image_shape[0]}: see the"
                " dataset's `max_length`"
            )
        names = set(inspect.signature(network.forward).parameters)
        network.register_forward_pre_hook(_KnownOnly(names), with_kwargs=True)
        if self._says_tokens and config.vocab_size > num_classes:
            network.register_forward_hook(_FirstOnly(num_classes))
        if self._says_tokens and _looks_ahead(network):
            raise kdkit.ModelError(
                f"config: {config.model_type} sees the tokens that it is to say;"
                " `is_decoder: true` hides them"
            )
        return network

    def load(self, module: nn.Module) -> None:
        """NAME's weights, of every layer that has as many numbers there."""
        if not self.options.pretrained:
            return
        with self._asking("loaded") as transformers:
            donor, found = self._class(transformers).from_pretrained(
                self.model_name,
                config=module.config,
                # a classifier of other classes keeps random weights; the encoder's misfits are
                # refused below
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **OWN_CODE_ONLY,
            )
        # a language model's last layer is no new one
        encoder = "" if self._says_tokens else f"{module.base_model_prefix}."
        absent = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
        # a pooler belongs to the classifier: many encoders are published without one
        if lacking := sorted(
            key for key in absent if key.startswith(encoder) and ".pooler." not in key
        ):
            raise kdkit.ModelError(
                f"'{self.model_name}' has not the weights of such a network ({len(lacking)} tensors"
                f" are missing, {lacking[0]} for one): leave `config` out, or begin with none of"
                " them (`pretrained: false`)"
            )
        module.load_state_dict(donor.state_dict())

    def rename(self, key: str, module: nn.Module) -> str:
        """DistilBERT's name of a layer of BERT; others have the same."""
        if getattr(module.config, "model_type", "") == "distilbert":
            for pattern, own in DISTILBERT:
                key = re.sub(pattern, own, key)
        return key

    def meaning(self, module: nn.Module) -> kdkit.Meaning:
        """The classes that its configuration names, and the tokenizer in its folder."""
        config: Any = module.config
        names = tuple(str(config.id2label[number]) for number in sorted(config.id2label))
        # what the library calls them by itself
        numbered = all(name == f"LABEL_{number}" for number, name in enumerate(names))
        tokenizer = (
            digest_of(self.model_name)[0]
            if self.options.pretrained and Path(self.model_name).is_dir()
            else ""
        )
        known = self.options.pretrained and not numbered
        return kdkit.Meaning(
            names if known else (), tokenizer, int(getattr(config, "vocab_size", 0) or 0)
        )

    def portable(self, module: nn.Module) -> kdkit.Portable:
        """A folder that transformers loads."""
        config: Any = module.config
        about = {**config.to_dict(), "architectures": [type(module).__name__]}
        own = {
            key: value
            for key, value in config.to_diff_dict().items()
            if key not in ("id2label", "label2id", "transformers_version")
        }
        options = {"model": f"hf/{config.model_type}", "pretrained": False, "config": own}
        how = f'load it by {HEADS[self.options.head]}.from_pretrained("{{folder}}")'
        return kdkit.Portable(options, about, how)

    @property
    def _says_tokens(self) -> bool:
        return self.options.head == "language_model"

    def _class(self, transformers: Any) -> Any:
        return getattr(transformers, HEADS[self.options.head])

    def _config(self, transformers: Any, num_classes: int) -> Any:
        said = dict(self.options.config)
        kind = said.pop("model_type", None)

        def made(**arguments: Any) -> Any:
            if kind is not None:
                return transformers.AutoConfig.for_model(kind, **arguments)
            # attn_implementation: what computes attention is not a folder's to say, for it may be
            # code of the hub
            found = transformers.AutoConfig.from_pretrained(
                self.model_name, attn_implementation=None, **OWN_CODE_ONLY, **arguments
            )
            # nor does an export hand on where its author has Python files
            vars(found).pop("auto_map", None)
            return found

        config = made()
        # or it would keep whatever it is given
        known = {*type(config)().to_dict(), *config.attribute_map}
        if unknown := [key for key in said if key not in known]:
            close = difflib.get_close_matches(unknown[0], known, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise kdkit.ModelError(f"config: {config.model_type} has no '{unknown[0]}'{hint}")
        if not self._says_tokens:
            return made(num_labels=num_classes, **said)
        return made(**{**({"vocab_size": num_classes} if kind is not None else {}), **said})

    @contextlib.contextmanager
    def _asking(self, what: str) -> Iterator[Any]:
        """The library, told to be quiet; what it raises becomes one line."""
        try:
            # many of its functions have no types
            transformers: Any = importlib.import_module("transformers")
        except ImportError:
            raise kdkit.ModelError("needs transformers: pip install 'kdkit[text]'") from None
        level = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            yield transformers
        except kdkit.ModelError:
            raise
        except Exception as error:  # whatever a hub, a file or an argument makes it raise
            name = self.model_name
            if name.startswith("/") and not Path(name).is_dir():
                raise kdkit.ModelError(f"there is no folder {name}") from error
            where = (
                "" if Path(name).is_dir() else "; a folder of this machine is written hf/./FOLDER"
            )
            raise kdkit.ModelError(
                f"'{self.model_name}' cannot be {what}: {kdkit.cause(error, 300)}{where}"
            ) from error
        finally:
            transformers.logging.set_verbosity(level)
            transformers.logging.enable_progress_bar()


def _positions(config: Any) -> int | None:
    """How many tokens a network can read; None where it does not count them."""
    most: int | None = getattr(config, "max_position_embeddings", None)
    if most is None or "roberta" not in config.model_type:
        return most
    return most - int(config.pad_token_id) - 1  # there, positions begin behind the padding's number


def _looks_ahead(network: nn.Module) -> bool:
    """Whether what a network says behind a token depends on the tokens that follow it."""
    import torch

    device = next(network.parameters()).device
    if device.type == "meta":  # shapes only
        return False
    ids = torch.tensor([[0, 1], [0, 2]], device=device)
    with kdkit.in_eval_mode(network), torch.no_grad():
        first, second = network(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 0]
    return not torch.allclose(first, second, rtol=1e-4, atol=1e-5)


class _KnownOnly:
    """A hook that keeps back what the network does not take: tokenizers also give what only
    other networks ask for.
    """

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        known = {name: value for name, value in kwargs.items() if name in self.names}
        # keys and values for tokens to come, which training does not ask for
        return args, {**({"use_cache": False} if "use_cache" in self.names else {}), **known}


class _FirstOnly:
    """A hook that keeps the logits of the first token ids, which are the tokenizer's."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        output.logits = output.logits[..., : self.count]
        return output


@kdkit.hookimpl
def kdkit_models() -> list[type[kdkit.ModelSource]]:
    return [HuggingFaceSource]
