"""Checks of the weights that networks begin with."""

from __future__ import annotations

from kdkit.contracts.known_answers import AnswersOptions
from kdkit.contracts.model_source import OWN_OUTPUTS, ModelOptions, ModelSource
from kdkit.errors import CheckpointError, InputError, ModelError, RecipeError
from kdkit.models.build import build_model, compare_checkpoint, random_weights
from kdkit.runs.networks import ModelFactory


def has_random_weights(options: object) -> bool:
    """Check whether the initial weights of a model, or those of its classifier, are specified
    nowhere: then they follow from the seed.
    """
    if isinstance(options, AnswersOptions):
        return False
    told = isinstance(options, ModelOptions) and (
        options.checkpoint or getattr(options, "pretrained", False)
    )
    return isinstance(options, ModelOptions) and (options.new_head or not told)


def compare_checkpoints(factory: ModelFactory) -> list[str]:
    """Check whether the checkpoints that the recipe names fit their networks, by names and shapes;
    return notes on them.

    Raises:
        RecipeError: some do not, one a line.
    """
    spec = factory.recipe.spec
    problems = []
    notes = []
    for place, options in spec.named_models():
        if options.checkpoint is None:
            continue
        source, shape = factory.recipe.model_source(options), factory.info.image_shape
        try:
            classes = (
                said
                if (said := getattr(options, OWN_OUTPUTS, None)) is not None
                else factory.task.outputs(factory.info)
            )
            # On the meta device: shapes are all that is compared, and a file's header tells them.
            built = build_model(
                options, source, classes, shape, weights=False, fields=factory.info.fields
            )
            told = compare_checkpoint(options, source, built.module, classes)
        except ModelError as error:
            # A network that cannot be built is told at its name, a file that does not fit it at the
            # file.
            kinds = {"checkpoint": CheckpointError, "input": InputError}
            found = (key for key, kind in kinds.items() if isinstance(error, kind))
            key = next(found, "model")
            problems.append(
                factory.recipe.problem([*place, key], str(error).removeprefix("model: "))
            )
        else:
            notes += [f"{options.checkpoint.name}: {note}" for note in told]
    if problems:
        raise RecipeError("\n".join(problems))
    return notes


def random_parts(factory: ModelFactory, name: str) -> str:
    """Describe which weights of a teacher its network's options leave random; empty if it loads its
    own.
    """
    options = factory.teacher_options(name)
    assert options is not None
    source = factory.recipe.model_source(options)
    # the model has pretrained weights, but the recipe does not request them
    if type(source).load is not ModelSource.load:
        return "the weights"
    # Builds the network twice from different seeds: what both agree in was read from somewhere.
    sees = factory.teacher(name).sees or factory.info.image_shape
    drawn, read = random_weights(source, factory.classes.own(name), sees)
    return (
        f"some weights ({', '.join(drawn[:3])})"
        if drawn and read
        else "the weights"
        if drawn
        else ""
    )
