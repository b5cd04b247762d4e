"""Writes a student as an ONNX file, and compares its answers with those of torch."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdkit import __version__
from kdkit.contracts.dataset_source import DataInfo
from kdkit.contracts.inputs import TOKENS, Shape, is_text, random_inputs
from kdkit.contracts.layers import outputs_of
from kdkit.contracts.model_source import InputOptions
from kdkit.contracts.task import Task
from kdkit.errors import ModelError
from kdkit.finite import to_json
from kdkit.models.seen import SeenInput
from kdkit.models.tapped import TappedModel
from kdkit.students.exported import Export, named_outputs, relative_gap, seen_by

ONNX_FILE = "model.onnx"

TOLERANCE = 1e-4  # between ONNX and torch, relative to the largest logit
INT8_STEP = 1 / 128  # the least tolerance of a network that rounds to 8 bits
SAFETY = 4  # its tolerance, as a multiple of the difference between torch's own kernels

IMAGES = ["images"]  # name of the only input of a network that takes them

ANSWERS = {"numbers": "numbers", "embeddings": "embedding"}  # by the meaning of rows; else logits

STEP = 32  # pixels: the largest stride of most networks whose answers have places
LARGER = 8 * STEP  # pixels by which images are larger for an export with free sides
LARGEST_SIDE = 2**14  # of images in an ONNX file with free sides, pixels
# bytes of weights from which an ONNX file keeps them beside itself: a single one ends at 2 GiB
EMBEDDED = 2**30


class _Deployed(nn.Module):
    """Input adaptation and network in one: from images in [0, 1], or a text, to logits."""

    def __init__(self, student: TappedModel, names: Sequence[str]) -> None:
        super().__init__()
        adapt = student.adapt
        # from what it sees of a sample: a camera may deliver no more than that
        self.adapt = adapt.of_seen() if isinstance(adapt, SeenInput) else adapt
        self.network = student.module
        self.names = names

    def forward(self, *tensors: Tensor) -> Tensor:
        if self.names == IMAGES:
            answer = self.network(self.adapt(*tensors))
        else:
            answer = self.network(**dict(zip(self.names, tensors, strict=True)))
        return outputs_of(answer)[0]


def write_onnx(student: TappedModel, info: DataInfo, task: Task, folder: Path) -> Export:
    """Write the file, after its answers have been compared with those of torch.

    Raises:
        ModelError: ONNX cannot express the network, or gives other answers.
    """
    # tried for minutes otherwise, before the exporter fails somewhere inside
    if (reason := getattr(student.module, "not_in_onnx", None)) is not None:
        raise ModelError(f"ONNX cannot express this network: {reason}")
    shape = student.sees or info.image_shape
    samples = random_inputs(shape, 3)
    probe = {IMAGES[0]: samples} if isinstance(samples, Tensor) else {**samples}
    # segment ids, for example, which are 0 in a single text
    probe |= {name: torch.zeros_like(probe[TOKENS]) for name in info.further}
    names = [*probe]
    network = _Deployed(student, names).eval()
    # dimensions that the exporter must not fix to those of the probe
    free = {0: torch.export.Dim("batch")}
    if is_text(shape):
        free[1] = torch.export.Dim("tokens", max=shape[0])
    sides = _sides(shape) if task.moves and not is_text(shape) else {}
    answer = ANSWERS.get(task.rows_are, "logits")
    # in the folder, so that moving the files cannot fail between two file systems
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as draft:
        path = Path(draft) / ONNX_FILE
        try:
            # on larger images: the exporter takes a map of one pixel for one of any size
            _export(
                network,
                _larger(probe, LARGER, LARGER) if sides else probe,
                path,
                free | sides,
                answer,
            )
        except ModelError:
            if not sides:
                raise
            sides = {}
            _export(network, probe, path, free, answer)
        _describe(path, info, task, shape, seen_by(student))
        # a batch of one is where an exporter that fixed the batch size fails
        batches = [{name: value[:1] for name, value in probe.items()}, probe]
        batches += [_larger(probe, STEP, 3 * STEP)] if sides else []
        compared = [*_compared(path, network, batches, answer)]
        # moved only after the comparison, so that a wrong export leaves no files
        written = sorted(Path(draft).iterdir())
        for file in written:
            os.replace(file, folder / file.name)
    files = tuple(folder / file.name for file in written)
    what = f"images (B, {', '.join(map(str, shape))}) in [0, 1] to {answer}, any batch size"
    if sides:
        what += f", other heights and widths that are multiples of {STEP}"
    if (seen := seen_by(student)) is not None:
        what += f"; of a sample they are: {seen}"
    if is_text(shape):
        what = (
            f"{' and '.join(names)} (B, N) of up to {shape[0]} tokens to {answer}, any batch size"
        )
    return Export(files, (what, *compared))


def _sides(shape: Shape) -> dict[int, Any]:
    """Return the free height and width of images whose answers have places; none if they are no
    multiples of the largest stride.
    """
    if any(side % STEP for side in shape[1:]):
        return {}
    return {
        number: STEP * torch.export.Dim(name, min=1, max=LARGEST_SIDE // STEP)
        for number, name in ((2, "height"), (3, "width"))
    }


def _export(
    network: nn.Module, probe: Mapping[str, Tensor], path: Path, free: Any, answer: str
) -> None:
    external = sum(v.nbytes for v in network.state_dict().values()) > EMBEDDED
    try:
        with _silence():
            torch.onnx.export(
                network,
                tuple(probe.values()),
                path,
                dynamo=True,
                dynamic_shapes=(tuple(free for _ in probe),),
                external_data=external,
                input_names=[*probe],
                output_names=[answer],
                verbose=False,
            )
    # the exporter raises errors of any type
    except Exception as error:
        raise ModelError(f"ONNX cannot express this network: {_first_line(error)}") from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the exporter from telling of its own internals, in thousands of lines where it fails."""
    before, nowhere = logging.root.manager.disable, io.StringIO()
    logging.disable()
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _larger(probe: Mapping[str, Tensor], height: int, width: int) -> dict[str, Tensor]:
    """Return random images that are higher and wider by that many pixels."""
    return {
        name: torch.rand((*images.shape[:2], images.shape[2] + height, images.shape[3] + width))
        for name, images in probe.items()
    }


def _describe(
    path: Path, info: DataInfo, task: Task, shape: Shape, seen: InputOptions | None
) -> None:
    """Write the meaning of inputs and outputs into an ONNX file: `metadata_props`, in JSON."""
    import onnx

    about = {
        "input_shape": list(shape),
        "input": seen.model_dump(mode="json", exclude_none=True) if seen else None,
        "class_names": list(named_outputs(task, info)),
        "task": task.name,
        "rows_are": task.rows_are,
        "kdkit_version": __version__,
    }
    if not is_text(shape):
        about["input_range"] = [0, 1]
    # without the weights, which may be larger than the 2 GiB that one message can hold
    model = onnx.load(path, load_external_data=False)
    onnx.helper.set_model_props(
        model, {key: to_json(value) for key, value in about.items() if value}
    )
    path.write_bytes(model.SerializeToString())


def _compared(
    path: Path, network: nn.Module, batches: Sequence[Mapping[str, Tensor]], answer: str
) -> Iterator[str]:
    """Compare the file's answers with those of torch; yield lines that say how far they are apart.

    Raises:
        ModelError: too far.
    """
    rounds = any(value.dtype == torch.int8 for value in network.buffers())
    own = max(_own_gap(network, batch) for batch in batches) if rounds else 0.0
    most = max(INT8_STEP, SAFETY * own) if rounds else TOLERANCE
    gap = _onnx_gap(path, network, batches, most, as_written=rounds)
    yield f"largest difference from torch's {answer}: {gap:.2g}"
    if rounds:
        # kernels for integers may saturate where the processor has no instructions for them
        kernels = _onnx_gap(path, network, batches, math.inf)
        yield f"the same with ONNX Runtime's int8 kernels of this processor: {kernels:.2g}"
        yield (
            f"torch's own kernels differ by {own:.2g} of the largest: where a sum lies between two"
            " numbers of 8 bits, its last digit decides"
        )


def _onnx_gap(
    path: Path,
    network: nn.Module,
    probes: Sequence[Mapping[str, Tensor]],
    tolerance: float,
    *,
    as_written: bool = False,
) -> float:
    """Return the largest difference of the answers, over all batches.

    Args:
        path: the ONNX file.
        network: what it was written from.
        probes: inputs by name.
        tolerance: relative to the largest answer.
        as_written: compute each operation as the file says, and fuse none.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    gaps = []
    for batch in probes:
        arrays = {name: value.numpy() for name, value in batch.items()}
        exported = torch.from_numpy(session.run(None, arrays)[0])
        with torch.no_grad():
            wanted = network(*batch.values())
        if (relative := relative_gap(exported, wanted)) > tolerance:
            raise ModelError(
                "the ONNX network gives other logits than torch: relative difference"
                f" {relative:.1g}; nothing was written"
            )
        gaps.append(float((exported - wanted).abs().max()))
    return max(gaps)


def _own_gap(network: nn.Module, probe: Mapping[str, Tensor]) -> float:
    """Return how far a network's answers go apart between kernels that add in another order: one
    sample at a time without oneDNN, and all together. Relative to the largest answer.
    """
    with torch.no_grad():
        together = network(*probe.values())
        with warnings.catch_warnings():
            # torch warns of a flag that is not used here
            warnings.simplefilter("ignore")
            with torch.backends.mkldnn.flags(enabled=False):
                singly = [
                    network(*(value[i : i + 1] for value in probe.values()))
                    for i in range(len(together))
                ]
    return relative_gap(torch.cat(singly), together)


def _first_line(error: BaseException) -> str:
    """Return the first line of what an error goes back to: the exporter's own tells its steps."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
