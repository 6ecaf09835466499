"""The library's modules as syntax trees, for tests that read what they import and name."""

import ast
import functools
import pathlib

import keras_ngd

ROOT = pathlib.Path(keras_ngd.__file__).parent


@functools.cache
def modules():
    """A dict from the library's files, as paths below it (`optimizers/kfac.py`), to their syntax trees."""
    paths = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
    return {name: ast.parse(path.read_text(), name) for name, path in paths.items()}


def imports(tree):
    """Full names of all that a module imports, wherever it does: `from a import b` is `a.b`.

    What stands under `if TYPE_CHECKING` is for annotations, and is never imported.
    """
    found = []
    for node in walked(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def walked(tree):
    """As `ast.walk`, without what stands under `if TYPE_CHECKING`."""
    nodes = [tree]
    for node in nodes:
        checked_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        nodes += node.orelse if checked_only else ast.iter_child_nodes(node)
        yield node


def calls(tree):
    """What a module calls, as it is written, without the arguments: `backend.name`."""
    return [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
