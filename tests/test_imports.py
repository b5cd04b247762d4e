"""Who may import whom: a room (a folder of kdkit) imports only from rooms before it. ARCHITECTURE.md says what each is for."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import kdkit

CORE = Path(kdkit.__file__).parent
PLUGINS = CORE.parent / "plugins"
BEFORE = {  # a room: the rooms right before it, whose own are before it too; "" is kdkit/ itself
    "": (),
    "contracts": ("",),
    "recipe": ("contracts",),
    "data": ("recipe",),
    "models": ("recipe",),
    "engine": ("data", "models"),
    "cache": ("data", "models"),
    "runs": ("engine", "cache"),
    "students": ("runs",),
    "study": ("students",),
    "testing": ("engine",),
    "start": ("study",),
    "cli": ("start",),
}
AT_THE_TOP = ("__init__", "__main__", "api")  # in kdkit/ itself, and may import from every room
MODULES = {".".join(path.relative_to(CORE).with_suffix("").parts): path for path in sorted(CORE.rglob("*.py"))}


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
    return any(part.startswith("_") for part in parts) or all(alias.name.startswith("_") for alias in node.names)


def own_modules(file):
    """The modules of kdkit that a file imports, by their names within it; a room's own `__init__` is one."""
    for module, names in imports(file):
        if module.split(".")[0] == "kdkit":
            within = module.partition(".")[2]
            for name in names or [""]:
                choices = [f"{within}.{name}".strip("."), within, f"{within}.__init__".strip(".")]
                yield next(choice for choice in choices if choice in MODULES)


def room_of(module):
    return module.rpartition(".")[0].split(".")[0] if "." in module else ""


def allowed(room):
    """The rooms that a room may import from: its own, and all before it."""
    return {room}.union(*(allowed(before) for before in BEFORE[room]))


def test_every_folder_is_a_room():
    assert {room_of(module) for module in MODULES} == set(BEFORE)


@pytest.mark.parametrize("room", BEFORE)
def test_a_room_imports_from_those_before_it(room):
    for module, file in MODULES.items():
        if room_of(module) == room and module not in AT_THE_TOP:
            above = [name for name in own_modules(file) if name in AT_THE_TOP[1:] or room_of(name) not in allowed(room)]
            assert above == [], f"{module} imports {above}"


def test_no_modules_import_one_another():
    ends_of_circles = {module: {name for name in own_modules(file) if name != "__init__"} for module, file in MODULES.items()}
    try:
        TopologicalSorter(ends_of_circles).prepare()
    except CycleError as error:
        pytest.fail(f"in a circle: {' -> '.join(error.args[1])}")


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
