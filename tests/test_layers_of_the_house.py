"""Who may import whom."""

import ast
from pathlib import Path

import pytest

import kdkit

CORE = Path(kdkit.__file__).parent
PLUGINS = CORE.parent / "plugins"
ORDER = """
    errors
    terminal
    spreadsheets
    launching
    runs.__init__
    runs.spreading
    finite
    randomness
    files
    recipe.dependencies
    engine.__init__
    engine.turns
    contracts.__init__
    contracts.options
    contracts.features
    contracts.records
    contracts.inputs
    contracts.adapters
    contracts.distributed
    contracts.loss_options
    contracts.layers
    models.__init__
    models.given_answers
    contracts.model_source
    contracts.dataset_source
    contracts.loss
    contracts.schedule
    contracts.peers
    contracts.ensembles
    contracts.hooks
    recipe.registry
    recipe.reading
    recipe.yaml_source
    recipe.sections
    models.devices
    recipe.types
    recipe.explain
    recipe.consent
    recipe.loading
    recipe.fetching
    recipe.fairness
    runs.agreement
    study.grid
    study.variants
    study.schema
    recipe.catalogue
    recipe.__init__
    runs.meaning
    models.normalization
    models.weight_files
    models.hooks
    models.backbone
    models.tapped
    models.trunk
    models.build
    models.inheritance
    models.folding
    cli.listing
    data.__init__
    data.augment
    runs.interrupts
    data.subsets
    data.transforms
    data.images
    data.texts
    data.labels
    data.streams
    data.loaders
    data.mixing
    engine.objective
    engine.reach
    engine.meter
    engine.optim
    models.freezing
    engine.trainer
    engine.evaluate
    testing.__init__
    testing.operations
    testing.probes
    testing.losses
    runs.checkpoints
    cache.store
    cache.folder
    cache.packing
    cache.fingerprint
    cache.teacher
    cache.given
    study.shared
    cache.opening
    runs.file_shapes
    runs.folder
    runs.progress
    runs.networks
    runs.check_caches
    runs.deployment
    runs.step_cost
    runs.random_batches
    runs.plan
    runs.checks
    students.__init__
    students.loaded
    students.predictions
    students.curves
    students.show
    runs.context
    runs.best_epochs
    runs.scoring
    runs.stage
    students.profile
    students.export
    students.cost_table
    engine.setup
    runs.training
    runs.fill_caches
    study.lockstep
    study.findings
    study.intervals
    study.lengths
    study.search
    study.step_memory
    study.measurements
    study.comparison
    study.sentences
    study.table
    study.report.cka
    study.report.document
    study.report.drawing
    study.report.mean_curves
    study.report.plots
    study.report.heatmaps
    study.report.predictions
    study.report.words
    study.report.sections
    study.report.page
    study.report.from_runs
    study.report.output
    api
    cache.__init__
    study.__init__
    study.report.__init__
    cli.console
    cli.usage
    cli.studies
    __init__
    cli.commands
    cli.__init__
    __main__
""".split()  # noqa: SIM905


def imports(file):
    """What a file imports, anywhere in it: (module, names); a plugin's own private modules are left out."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert is_private_part(file, node), f"{file}: relative import"
        elif isinstance(node, ast.ImportFrom):
            yield node.module, [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)


def is_private_part(file, node):
    """Whether a relative import stays among the plugins, and reaches a private module there (a path part begins with `_`)."""
    if PLUGINS not in file.parents or not (file.parents[node.level - 1] == PLUGINS or PLUGINS in file.parents[node.level - 1].parents):
        return False
    parts = [*file.parents[node.level - 1].relative_to(PLUGINS).parts, *(node.module or "").split(".")]
    return any(part.startswith("_") for part in parts)


def own_modules(file):
    """The modules of kdkit that a file imports."""
    for module, names in imports(file):
        if module == "kdkit" or module.startswith("kdkit."):
            within = module.partition(".")[2]
            parts = [f"{within}.{name}".strip(".") for name in names]
            yield from [part for part in parts if part in ORDER] or ([within] if within else [])


def path_of(module):
    return CORE / f"{module.replace('.', '/')}.py"


def test_every_module_has_its_place():
    assert sorted(ORDER) == sorted(str(path.relative_to(CORE).with_suffix("")).replace("/", ".") for path in CORE.rglob("*.py"))


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_from_those_before_it(module):
    before = ORDER[: ORDER.index(module)]
    above = [name for name in own_modules(path_of(module)) if name not in before]
    assert above == [], f"{module} imports {above}, which come after it"


def test_the_core_never_imports_the_plugins():
    for file in CORE.rglob("*.py"):
        assert not any(module.split(".")[0] in ("kdkit_plugins", "plugins") for module, _ in imports(file)), file


def test_plugins_import_the_public_names_only():
    files = list(PLUGINS.rglob("*.py"))
    assert len(files) > 20
    for file in files:
        for module, names in imports(file):
            assert not module.startswith("kdkit."), f"{file}: {module}"
            assert module.split(".")[0] != "kdkit_plugins", f"{file}: a plugin is a file of its own"
            assert module != "kdkit" or not names, f"{file}: write `import kdkit`"
        used = {n.attr for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "kdkit"}
        assert used <= set(kdkit.__all__) | {"__version__"}, f"{file}: {used - set(kdkit.__all__)}"
