"""Tests that modules import what they may, of the backends and of each other, read from their sources."""

import ast

import pytest

from tf_tests.sources import ROOT, calls, imports, modules

# Modules that are of one backend by their nature: their docstrings say so.
OF_TENSORFLOW = {
    "analysis/tensorflow_steps.py",
    "distributed/by_dtype.py",
    "distributed/horovod.py",
    "distributed/multi_worker.py",
    "distributed/strategies.py",
}
OF_JAX = {"analysis/tpu_steps.py", "sharding/division.py", "sharding/layout.py"}
IN_BACKEND = {name for name in modules() if name.startswith("backend/")}

# Who may import a package, and who does.
IMPORTERS = {
    # TensorFlow writes what TensorBoard reads.
    "tensorflow": {*OF_TENSORFLOW, *IN_BACKEND, "callbacks/summaries.py"},
    "jax": {*OF_JAX, *IN_BACKEND},
    "horovod": {"distributed/horovod.py"},
}


def of_package(name, package):
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("package", IMPORTERS)
def test_who_imports_a_backend(package):
    found = {name for name, tree in modules().items() if any(of_package(i, package) for i in imports(tree))}
    others = found - IMPORTERS[package]
    assert not others, f"import {package}, which is for `keras_ngd.backend`: {others}"
    assert IMPORTERS[package] - IN_BACKEND <= found, "listed here, but imports it no longer"


def test_who_asks_which_backend_runs():
    asking = {name for name, tree in modules().items() if "keras.backend.backend" in calls(tree)}
    assert asking == {"backend/running.py"}
    # These say in an error that they are of the other backend.
    asking = {name for name, tree in modules().items() if "backend.name" in calls(tree)}
    assert asking == {"analysis/tensorflow_steps.py", "analysis/tpu_steps.py"}
    running = "keras_ngd.backend.running"
    asking = {name for name, tree in modules().items() if any(of_package(i, running) for i in imports(tree))}
    assert asking <= IN_BACKEND


@pytest.mark.parametrize("name", sorted(OF_TENSORFLOW | OF_JAX))
def test_modules_of_one_backend_say_so(name):
    docstring = ast.get_docstring(modules()[name])
    assert ("TensorFlow" if name in OF_TENSORFLOW else "JAX") in docstring
    assert "alone" in docstring or "that backend" in docstring


# Directions. Each part of the library, a package or a module of its own, and what else of ours it may import: nothing that comes
# after it, so that there are no cycles. BUILD says the same.
MAY_IMPORT = {
    "typing": (),
    "keras_private": (),
    "backend": ("keras_private",),
    "schedules": ("typing",),
    "report": ("typing",),
    "replica": ("backend", "keras_private"),
    "sharding": ("backend", "keras_private"),
    "linalg": ("backend", "sharding", "typing"),
    "curvature": ("backend", "linalg", "sharding", "typing"),
    "fisher": ("backend", "keras_private", "replica", "typing"),
    "layers": ("backend", "fisher", "keras_private", "linalg", "typing"),
    "statistics": ("backend", "fisher", "keras_private", "linalg", "replica", "schedules", "sharding", "typing"),
    "distributed": ("backend", "keras_private", "replica", "schedules", "typing"),
    "optimizers": (
        "backend",
        "curvature",
        "distributed",
        "fisher",
        "keras_private",
        "layers",
        "linalg",
        "replica",
        "schedules",
        "sharding",
        "statistics",
        "typing",
    ),
    "capturing": (
        "backend",
        "keras_private",
        "layers",
        "optimizers",
        "replica",
        "report",
        "sharding",
        "statistics",
        "typing",
    ),
    "callbacks": ("distributed", "keras_private", "optimizers", "schedules", "sharding", "typing"),
    "analysis": (
        "backend",
        "capturing",
        "curvature",
        "distributed",
        "keras_private",
        "layers",
        "linalg",
        "optimizers",
        "schedules",
        "statistics",
    ),
    "capture": ("analysis", "capturing"),
    "__init__": (
        "analysis",
        "callbacks",
        "capture",
        "capturing",
        "distributed",
        "fisher",
        "layers",
        "optimizers",
        "report",
        "schedules",
    ),
}


def part_of(name):
    """The part of the library that a file belongs to."""
    return name.split("/")[0].removesuffix(".py")


def parts_imported(tree):
    """The parts of the library that a module imports, by statements anywhere in it and by `import_module`."""
    names = imports(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names += [
                c.value for c in ast.walk(node.args[0]) if isinstance(c, ast.Constant) and isinstance(c.value, str)
            ]
    names = [name.split(".") for name in names]
    return {(name[1] if len(name) > 1 else "__init__") for name in names if name[0] == "keras_ngd"}


def all_imported():
    found = {part: set() for part in MAY_IMPORT}
    for name, tree in modules().items():
        found[part_of(name)] |= parts_imported(tree) - {part_of(name)}
    return found


def test_every_part_has_its_place():
    assert {part_of(name) for name in modules()} == set(MAY_IMPORT)


@pytest.mark.parametrize("name", modules())
def test_imports_go_one_way(name):
    others = parts_imported(modules()[name]) - {part_of(name), *MAY_IMPORT[part_of(name)]}
    assert not others, f"{part_of(name)} may not import {others}"


def test_what_may_be_imported_comes_before():
    parts = list(MAY_IMPORT)
    for i, part in enumerate(parts):
        assert set(MAY_IMPORT[part]) <= set(parts[:i]), part


def test_what_may_be_imported_is():
    assert {part: set(may) for part, may in MAY_IMPORT.items()} == all_imported()


def test_there_are_no_cycles():
    graph, found = all_imported(), []

    def visit(part, path):
        if part in path:
            pytest.fail(f"a cycle: {' -> '.join([*path[path.index(part) :], part])}")
        if part not in found:
            for other in sorted(graph[part]):
                visit(other, [*path, part])
            found.append(part)

    for part in graph:
        visit(part, [])


def test_build_says_the_same():
    targets = {}
    for node in ast.walk(ast.parse((ROOT.parent / "BUILD").read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "py_library":
            arguments = {keyword.arg: keyword.value for keyword in node.keywords}
            deps = ast.literal_eval(arguments["deps"]) if "deps" in arguments else []
            targets[ast.literal_eval(arguments["name"])] = sorted(dep.removeprefix(":") for dep in deps)
    for part, may in MAY_IMPORT.items():
        # The package as a whole, for those who import it.
        assert targets["keras_ngd" if part == "__init__" else part] == sorted(may), part


def test_no_file_is_long():
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name in modules()}
    assert not {name: length for name, length in lengths.items() if length > 400}


def test_no_two_files_have_one_name():
    names = [name.split("/")[-1] for name in modules() if not name.endswith("__init__.py")]
    assert not {name for name in names if names.count(name) > 1}
