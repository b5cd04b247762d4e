"""Typed options of plugins, and numbers that change during training."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    JsonValue,
    ValidationError,
)
from pydantic_core import CoreSchema, SchemaValidator, core_schema

from kdkit.errors import shorten, shown


class Options(BaseModel):
    """Base of all option records: unknown keys are errors, and instances are immutable."""

    # defer_build: a command validates few of the options that all plugins define
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, defer_build=True)


class Ramp(Options):
    """A number that moves `from` one value `to` another over some epochs, then stays."""

    from_: float = Field(alias="from", description="Value until `start`.")
    to: float = Field(description="Value from `start + epochs` on.")
    epochs: float = Field(gt=0, description="Duration of the change, in epochs of the stage.")
    start: float = Field(
        default=0.0, ge=0, description="Start of the change, in epochs of the stage."
    )
    shape: Literal["linear", "cosine", "sigmoid", "exponential"] = Field(
        default="linear",
        description=(
            "Shape of the change over x in [0, 1]. cosine: half a cosine wave; sigmoid:"
            " exp(-5 (1 - x)^2), which starts at exp(-5) (Laine & Aila 2017); exponential: a"
            " constant factor per epoch (both ends > 0)."
        ),
    )

    def at(self, epoch: float) -> float:
        """Return the value at a (fractional) epoch of the stage."""
        # before it starts, x would be below 0, which the shapes are not made for
        if epoch < self.start:
            return self.from_
        x = min(1.0, (epoch - self.start) / self.epochs)
        if self.shape == "exponential":
            return float(self.from_ * (self.to / self.from_) ** x)
        return self.from_ + (self.to - self.from_) * _PROGRESS[self.shape](x)

    def model_post_init(self, context: Any, /) -> None:
        if self.shape == "exponential" and min(self.from_, self.to) <= 0:
            raise ValueError("an exponential ramp needs both ends above 0")

    def __str__(self) -> str:
        return f"{self.from_:g}->{self.to:g}"


# of the way, for x in [0, 1]
_PROGRESS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: x,
    "cosine": lambda x: 0.5 - 0.5 * math.cos(math.pi * x),
    "sigmoid": lambda x: math.exp(-5 * (1 - x) ** 2),
}


class _NumberOrRamp:
    """Lets a float field hold a Ramp until the objective replaces it by the current number."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        number = handler(source)
        ends = SchemaValidator(number)

        # a ramp is monotonic, so bounds that hold at both ends hold in between
        def check_ends(ramp: Ramp) -> Ramp:
            for key, value in (("from", ramp.from_), ("to", ramp.to)):
                try:
                    ends.validate_python(value)
                except ValidationError as error:
                    raise ValueError(
                        f"{key}: {said(error.errors()[0]['msg'])}, got {shown(value)}"
                    ) from None
            return ramp

        ramp = core_schema.no_info_after_validator_function(
            check_ends, handler.generate_schema(Ramp)
        )
        # tagged, because a plain union reports the errors of both members
        return core_schema.tagged_union_schema(
            {"ramp": ramp, "number": number},
            discriminator=lambda value: "ramp" if isinstance(value, (Mapping, Ramp)) else "number",
        )


Rampable = Annotated[float, _NumberOrRamp()]
"""A float that a recipe may write as `{from, to, epochs, start, shape}`; a plugin sees floats."""


def said(message: str) -> str:
    """Format pydantic's message as the end of a line."""
    return f"{message[:1].lower()}{message[1:]}"


OptionsT = TypeVar("OptionsT", bound=Options)


def ramps_of(options: Options) -> dict[str, Ramp]:
    """Return the options that are ramps."""
    return {name: value for name, value in options if isinstance(value, Ramp)}


def at_epoch(options: OptionsT, epoch: float) -> OptionsT:
    """Return the same options with every Ramp replaced by its value at that epoch."""
    ramps = {name: ramp.at(epoch) for name, ramp in ramps_of(options).items()}
    # not validated again: the bounds hold at both ends, see `check_ends`
    return options.model_copy(update=ramps) if ramps else options


class Text(str):
    """A string of a recipe that remembers the folder of the file it was written in."""

    folder: Path

    @classmethod
    def of(cls, value: str, folder: Path) -> Self:
        text = cls(value)
        text.folder = folder
        return text


def _without_origin(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_origin(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_origin(item) for item in value]
    return str(value) if isinstance(value, Text) else value


Arguments = Annotated[dict[str, Any], AfterValidator(_without_origin)]
"""Arguments that are passed on unchanged, in plain types."""

LOADER_KEYS = frozenset(
    {
        # arguments of transformers and datasets
        "trust_remote_code",
        "code_revision",
        "revision",
        "auto_map",
        "token",
        "use_auth_token",
        "cache_dir",
        "force_download",
        "resume_download",
        "local_files_only",
        "proxies",
        "subfolder",
        "mirror",
        "use_safetensors",
        "weights_only",
        "state_dict",
        "from_tf",
        "from_flax",
        "gguf_file",
        "variant",
        "adapter_name",
        "adapter_kwargs",
        "device_map",
        "max_memory",
        "offload_folder",
        "low_cpu_mem_usage",
        "attn_implementation",
        "experts_implementation",
        "allow_all_kernels",
        "use_kernels",
        "kernel_config",
        "quantization_config",
        "name_or_path",
        # arguments of timm
        "pretrained",
        "pretrained_cfg",
        "checkpoint_path",
        "scriptable",
        "exportable",
        "no_jit",
        "pretrained_strict",
        "pretrained_filter_fn",
        "pretrained_model_args",
        "kwargs_filter",
        "model_cfg",
        "feature_cfg",
        # arguments of torchvision
        "weights",
        "weights_backbone",
        "progress",
        # values from the data
        "num_classes",
        "num_labels",
    }
)
"""Arguments that control loading or follow from the data; none defines the network."""


def _without_loader_keys(arguments: dict[str, Any]) -> dict[str, Any]:
    if wrong := [key for key in arguments if key in LOADER_KEYS]:
        raise ValueError(
            f"'{wrong[0]}' is no part of the network: it tells the library how to load it, which a"
            " recipe does not"
        )
    return arguments


NetworkArguments = Annotated[Arguments, AfterValidator(_without_loader_keys)]
"""Arguments for a library that builds a network, without those that control loading."""


def path_of(text: str) -> Path:
    """Resolve a text as a path, relative to the file that holds it or to the current folder.

    Raises:
        ValueError: no file can have this name.
    """
    # an override on the command line is no part of a file
    folder = text.folder if isinstance(text, Text) else Path.cwd()
    # real, as consent and fingerprints compare files, not the links that lead to them
    try:
        path = Path(os.path.realpath(folder / Path(text).expanduser()))
    except (RuntimeError, ValueError) as error:  # `~name` of an unknown user, or a NUL character
        raise ValueError(f"{shown(text)} is no path: {error}") from None
    return _fitting(path)


def _fitting(path: Path) -> Path:
    # in bytes, as file systems count: a letter may take four
    longest = max((len(os.fsencode(name)) for name in path.parts), default=0)
    if longest > LONGEST_FILE_NAME or len(os.fsencode(path)) > LONGEST_PATH:
        raise ValueError(
            f"the name of a file has {LONGEST_FILE_NAME} bytes at most, here one has {longest:,}:"
            f" {shorten(str(path))}"
        )
    return path


LONGEST_FILE_NAME, LONGEST_PATH = 255, 4000

RecipePath = Annotated[
    Path, BeforeValidator(lambda value: path_of(value) if isinstance(value, str) else value)
]
"""A path relative to the file that contains it (on the command line: the current folder)."""

FolderPath = Annotated[Path, AfterValidator(_fitting)]
"""A folder that is relative to the current one."""

LARGEST_INT = 2**63 - 1
"""Larger integers in a recipe are treated as mistakes: they fit no int64."""

SIDE, COUNT = 4_096, 1_000_000
"""Upper bounds of options: pixels of an image's side; things processed one by one."""

RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
TERM_NAME = r"^[a-z][a-z0-9_]*$"
LONGEST_NAME = 200
"""Maximum length of a run's name, which is also the name of its folder and files."""

IN_WORDS = {
    RUN_NAME: "letters, digits, '.', '_' and '-', a letter or digit first",
    TERM_NAME: "small letters, digits and '_', a letter first",
}
"""Descriptions of patterns for error messages."""

BOOKKEEPING: dict[str, JsonValue] = {"bookkeeping": True}
"""`Field(json_schema_extra=BOOKKEEPING)`: an option that changes no result, such as where files
lie; a run may change it and go on.
"""

CODE: dict[str, JsonValue] = {"code": True}
"""`Field(json_schema_extra=CODE)`: the path of a Python file that is run. kdkit announces it,
and asks for consent if a run folder names it.
"""

LATER: dict[str, JsonValue] = {"later": True}
"""Option added after release: left out of the fingerprint at its default; old runs resume."""
