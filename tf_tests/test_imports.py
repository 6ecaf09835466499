"""Tests that modules import what they may: of the backends, read from their sources."""

import ast

import pytest

from tf_tests.sources import calls, imports, modules

# Modules that are of one backend by their nature: their docstrings say so.
OF_TENSORFLOW = {
    "analysis/tensorflow_steps.py",
    "distributed/by_dtype.py",
    "distributed/horovod.py",
    "distributed/multi_worker.py",
    "distributed/replicas.py",
}
OF_JAX = {"analysis/tpu_steps.py", "sharding.py"}
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
