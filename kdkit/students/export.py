"""Exports a run's student for use without its run: as a folder for timm, or as an ONNX file."""

from __future__ import annotations

import hashlib
import importlib.util
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from kdkit import __version__
from kdkit.contracts.dataset_source import DataInfo
from kdkit.contracts.inputs import TOKENS, is_text
from kdkit.contracts.model_source import FIRST_WEIGHTS, ModelOptions, ModelSource
from kdkit.contracts.records import MASK
from kdkit.errors import ModelError, RunError, cause
from kdkit.files import sealed, write_atomically
from kdkit.finite import to_json
from kdkit.models.normalization import NormalizationAdapter
from kdkit.models.tapped import TappedModel
from kdkit.recipe.types import DEFAULT_SOURCE
from kdkit.runs.deployment import deploying
from kdkit.runs.scoring import weights
from kdkit.students.export_onnx import ONNX_FILE, write_onnx
from kdkit.students.exported import Export, named_outputs, relative_gap, seen_by
from kdkit.students.loaded import EXPORTED, WEIGHTS, LoadedRun

Format = Literal["timm", "onnx"]
ONNX_NEEDS = ("onnx", "onnxscript", "onnxruntime")
# entries of timm's configuration that describe the architecture; the others describe timm's weights
TIMM_KEPT = ("classifier", "first_conv", "fixed_input_size", "license")


def export(
    run: LoadedRun, form: Format = "timm", folder: Path | None = None, *, best: bool = False
) -> Export:
    """Export a run's student.

    Args:
        run: the run to export.
        form: timm: weights and a `config.json`; onnx: one network from images in [0, 1] to logits,
            for any batch size. It takes what the student sees of a sample (`input`), and its
            metadata say what that is.
        folder: the output folder (default: `export` in the run folder).
        best: the epoch with the best validation accuracy, not the last.

    Raises:
        RunError: the run is not finished.
        ModelError: a loss has added parts to the student, and the format is timm; ONNX cannot
            express the network, gives other logits, or is not installed.
    """
    if form == "onnx" and (
        missing := [name for name in ONNX_NEEDS if importlib.util.find_spec(name) is None]
    ):
        raise ModelError(f"--format onnx needs {', '.join(missing)}: pip install kdkit[export]")
    if form == "timm" and run.deployed(best=best) is not None:
        names = ", ".join(deploying(run.recipe))
        raise ModelError(
            f"{run.folder.path}: the student is deployed with parts of {names}, which timm cannot"
            " build; use --format onnx"
        )
    # a folder that the user names may be a link; one in a run folder may be a stranger's
    target = folder or run.folder.path / "export"
    _refuse_foreign(target, run.folder.path if folder is None else target)
    student = run.student(best=best, channels_last=False)
    target.mkdir(parents=True, exist_ok=True)
    network, source = run.network(best=best), run.model_source(best=best)
    if form == "onnx":
        return write_onnx(student, run.info, run.recipe.task, target)
    return _write_weights(run, student, network, source, target)


def _refuse_foreign(target: Path, home: Path) -> None:
    """Check that only kdkit's own files are replaced, and no link leads elsewhere.

    Raises:
        RunError: a file is not kdkit's, or a link leads elsewhere.
    """
    if not target.resolve().is_relative_to(home.resolve()):
        raise RunError(
            f"{target}: is a link to {target.resolve()}; name that folder by --output if the"
            " student is to be written there"
        )
    # by their content, as `config.json` and `model.onnx` are names that others use too
    about, network = target / EXPORTED, target / ONNX_FILE
    if (about.exists() or (target / WEIGHTS).exists()) and not _mentions(about, b'"kdkit"'):
        raise RunError(f"{about}: is not kdkit's, and would be replaced; choose another --output")
    if network.exists() and not _mentions(network, b"kdkit_version"):
        raise RunError(f"{network}: is not kdkit's, and would be replaced; choose another --output")


def _mentions(file: Path, word: bytes) -> bool:
    # an empty file cannot be mapped
    if not file.is_file() or not file.stat().st_size:
        return False
    with (
        file.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return content.find(word) >= 0


def _write_weights(
    run: LoadedRun, student: TappedModel, network: ModelOptions, source: ModelSource, folder: Path
) -> Export:
    own, files = _own_config(run, network), (folder / WEIGHTS, folder / EXPORTED)
    names = to_json(named_outputs(run.recipe.task, run.info))
    # transformers requires `format`
    content = weights(student, {"format": "pt", "class_names": names})
    write_atomically(files[0], content)
    own["files"] = {WEIGHTS: hashlib.sha256(content).hexdigest()}
    if (portable := source.portable(student.module)) is not None:
        options = {**own["options"], **portable.options}
        about = sealed({**own, "options": options, "needs_files": []})
        _write_json(files[1], {**_named(portable.config, run.info), "kdkit": about})
        how = portable.how.format(folder=folder, outputs=run.recipe.task.outputs(run.info))
        return Export(files, (how, f'or by kdkit.load_student("{folder}")', _expects(student)))
    reason = f"{source.name} is not timm"
    if source.name == DEFAULT_SOURCE:
        _write_json(files[1], {**_timm_config(run, student, network, source), "kdkit": sealed(own)})
        reason = _difference(student, folder)
        if not reason:
            how = (
                f'load it by timm.create_model("local-dir:{folder}", pretrained=True); checked: it'
                " gives the same logits"
            )
            return Export(files, (how, _expects(student)))
    # A name that timm does not have, so that its message says what this is.
    architecture = {
        "architecture": f"kdkit:{source.name}/{source.model_name}",
        "num_classes": run.recipe.task.outputs(run.info),
    }
    _write_json(files[1], {**architecture, "kdkit": sealed(own)})
    how = f'load it by kdkit.load_student("{folder}")'
    if own["needs_files"]:
        how = f"build the network by {', '.join(own['needs_files'])} and load {WEIGHTS} into it"
    reason = f"plain timm cannot rebuild this network: {reason}"
    return Export(files, (reason, how, _expects(student)))


def _named(config: Mapping[str, Any], info: DataInfo) -> Mapping[str, Any]:
    """Put the classes' names into a configuration of transformers, which has numbers for them."""
    if "id2label" not in config or not info.class_names:
        return config
    names = dict(enumerate(info.class_names))
    return {**config, "id2label": names, "label2id": {name: i for i, name in names.items()}}


def _own_config(run: LoadedRun, options: ModelOptions) -> dict[str, Any]:
    """Return the options that `kdkit.load_student` builds the network from."""
    # paths mean nothing on another machine
    files = sorted(key for key, value in options if isinstance(value, Path) and key != "checkpoint")
    return {
        "version": __version__,
        "options": options.model_dump(
            mode="json", exclude={*FIRST_WEIGHTS, *files}, exclude_none=True
        ),
        "needs_files": [getattr(options, key).name for key in files],
        "outputs": run.recipe.task.outputs(run.info),
        "takes": run.recipe.task.takes,
        "image_shape": list(run.info.image_shape),
        **({"fields": dict(run.info.fields)} if run.info.fields else {}),
        "class_names": list(named_outputs(run.recipe.task, run.info)),
        "task": run.recipe.task.name,
        "rows_are": run.recipe.task.rows_are,
        "images": _images(run),
    }


def _images(run: LoadedRun) -> dict[str, Any]:
    """Return what predictions for image files need: the task, and how images are prepared."""
    task, spec = run.recipe.task, run.recipe.spec.data
    prepared = spec.model_dump(
        mode="json", include={"image_size", "crop_pct", "interpolation", "eval_batch_size"}
    )
    options = task.options.model_dump(mode="json", exclude={"use"})
    return {"task": {"use": task.name, **options}, "outputs": run.info.outputs, "data": prepared}


def _timm_config(
    run: LoadedRun, student: TappedModel, network: ModelOptions, source: ModelSource
) -> dict[str, Any]:
    """Return timm's configuration: an architecture, its arguments, properties of its images."""
    spec, built = run.recipe.spec, getattr(student.module, "pretrained_cfg", None) or {}
    mean, std = expected(student)
    shape = student.input_shape or run.info.image_shape
    about = {
        **{key: built[key] for key in TIMM_KEPT if built.get(key) is not None},
        "input_size": list(shape),
        "mean": mean,
        "std": std,
        "num_classes": run.recipe.task.outputs(run.info),
        "interpolation": spec.data.interpolation,
        "crop_pct": spec.data.crop_pct,
    }
    config = {
        "architecture": built.get("architecture", source.model_name),
        "num_classes": run.recipe.task.outputs(run.info),
        "num_features": getattr(student.module, "num_features", None),
        "pretrained_cfg": about,
        "model_args": {"in_chans": shape[0], **getattr(network, "args", {})},
    }
    names = named_outputs(run.recipe.task, run.info)
    return {**config, "label_names": list(names)} if names else config


def expected(student: TappedModel) -> tuple[list[float], list[float]]:
    """Return the mean and deviation per channel that the network expects of images in [0, 1]."""
    adapter = getattr(student.adapt, "normalization", None)
    if not isinstance(adapter, NormalizationAdapter):
        return [0.0], [1.0]
    scale, shift = (
        value.detach().double().flatten().cpu() for value in (adapter.scale, adapter.shift)
    )
    # 7 digits, as many as float32 has: 0.485, not 0.48500001; + 0.0 turns -0.0 into 0.0
    mean, std = (
        [float(f"{v:.7g}") + 0.0 for v in row.tolist()] for row in (-shift / scale, 1 / scale)
    )
    return mean, std


def _expects(student: TappedModel) -> str:
    mean, std = ("/".join(f"{v:g}" for v in row) for row in expected(student))
    shape = ", ".join(map(str, student.input_shape or ()))
    if is_text(student.input_shape or ()):
        return f"its network takes token ids (B, N) by the name of {TOKENS}, and their {MASK}"
    what = f"its network takes images (B, {shape}) normalised by mean {mean}, std {std}"
    seen = seen_by(student)
    return f"{what}; it sees of a sample: {seen}" if seen else what


def _difference(student: TappedModel, folder: Path) -> str:
    """Describe how timm's network from the folder differs from the student; empty: not at all."""
    import timm

    ours = {name: tuple(value.shape) for name, value in student.module.state_dict().items()}
    try:
        theirs = {
            name: tuple(value.shape)
            for name, value in timm.create_model(f"local-dir:{folder}").state_dict().items()
        }
        # before the weights: timm would report all misfits at once, in a page of text
        if difference := _other_shapes(ours, theirs):
            return difference
        rebuilt = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        images = torch.rand(
            (2, *(student.input_shape or ())), generator=torch.Generator().manual_seed(0)
        )
        with torch.no_grad():
            gap = relative_gap(rebuilt(images), student.module(images))
    except Exception as error:  # libraries raise errors of any type for unknown arguments
        return cause(error)
    return f"its logits differ by {gap:.1g}" if gap > 1e-6 else ""


def _other_shapes(
    ours: Mapping[str, tuple[int, ...]], theirs: Mapping[str, tuple[int, ...]]
) -> str:
    for name in (*ours, *theirs):
        if ours.get(name) != theirs.get(name):
            here, there = (str(shapes.get(name, "not there")) for shapes in (ours, theirs))
            return f"its {name} is {here}, that of timm's {there}"
    return ""


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, (to_json(content, indent=2) + "\n").encode())
