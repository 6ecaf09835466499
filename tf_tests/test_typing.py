"""Tests that annotations are complete where `pyproject.toml` says so, and of all public names."""

import ast
import importlib
import inspect
import tomllib

import keras
import pytest

from tf_tests.sources import ROOT, modules

# The packages whose exported names are public, or contracts.
EXPORTING = (
    "keras_ngd",
    "keras_ngd.analysis",
    "keras_ngd.callbacks",
    "keras_ngd.capture",
    "keras_ngd.capturing",
    "keras_ngd.curvature",
    "keras_ngd.distributed",
    "keras_ngd.layers",
    "keras_ngd.optimizers",
    "keras_ngd.schedules",
    "keras_ngd.statistics",
)
OF_TENSORFLOW = ("Horovod", "MultiWorkerMirroredStrategy")


def annotated_modules():
    """Files of the modules that mypy is told to find complete."""
    settings = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["tool"]["mypy"]
    [names] = [entry["module"] for entry in settings["overrides"] if entry.get("disallow_untyped_defs")]
    found = []
    for name in names:
        path = name.removeprefix("keras_ngd.").replace(".", "/")
        own = [file for file in modules() if file in (f"{path}.py", f"{path.removesuffix('/*')}/__init__.py")]
        if path.endswith("/*"):
            own = [file for file in modules() if file.startswith(path.removesuffix("*"))]
        assert own, f"{name} is listed, but there is no such module"
        found += own
    return found


def missing(node):
    """What a function's definition leaves out."""
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    left_out = [a.arg for a in named if a and a.annotation is None and a.arg not in ("self", "cls")]
    return left_out + (["return"] if node.returns is None else [])


@pytest.mark.parametrize("name", annotated_modules())
def test_all_functions_are_annotated(name):
    functions = [node for node in ast.walk(modules()[name]) if isinstance(node, ast.FunctionDef)]
    found = {f"{node.name}, line {node.lineno}": missing(node) for node in functions if missing(node)}
    assert not found


def exported():
    """Each object that is exported anywhere, once, and those of TensorFlow's where that runs."""
    found = {}
    for package in EXPORTING:
        # By this way, as `keras_ngd.capture` is a function, too.
        module = importlib.import_module(package)
        for name in module.__all__:
            if name in OF_TENSORFLOW and keras.backend.backend() != "tensorflow":
                continue
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                found[id(value)] = pytest.param(value, id=f"{package}.{name}")
    for name in ("CaptureReport", "LayerReport"):
        assert any(name in parameter.id for parameter in found.values())
    return list(found.values())


def own_functions(kind):
    """The functions that a class and its bases of ours define: methods, properties, and those of the class."""
    for base in kind.__mro__:
        if base.__module__.startswith("keras_ngd"):
            for name, value in vars(base).items():
                value = getattr(value, "fget", None) or getattr(value, "__func__", None) or value
                # `dataclass` makes some, too.
                if inspect.isfunction(value) and value.__code__.co_filename.startswith(str(ROOT)):
                    yield f"{base.__name__}.{name}", value


def unannotated(function):
    signature = inspect.signature(function)
    left_out = [
        p.name
        for p in signature.parameters.values()
        if p.annotation is inspect.Parameter.empty and p.name not in ("self", "cls")
    ]
    return left_out + (["return"] if signature.return_annotation is inspect.Signature.empty else [])


@pytest.mark.parametrize("value", exported())
def test_public_names_are_annotated(value):
    functions = own_functions(value) if inspect.isclass(value) else [(value.__name__, value)]
    found = {name: unannotated(function) for name, function in functions}
    assert not {name: left_out for name, left_out in found.items() if left_out}


def test_geometries_declare_what_they_have():
    from keras_ngd.layers import DenseGeometry, MatrixGeometry

    declared = {name for kind in MatrixGeometry.__mro__ for name in inspect.get_annotations(kind)}
    assert declared - {"structure"} == set(vars(DenseGeometry(2, 3, True)))


def test_package_says_that_it_is_annotated():
    assert (ROOT / "py.typed").is_file()


def test_typing_imports_nothing_of_ours():
    names = [ast.unparse(n) for n in ast.walk(modules()["typing.py"]) if isinstance(n, (ast.Import, ast.ImportFrom))]
    assert not [name for name in names if "keras_ngd" in name]
