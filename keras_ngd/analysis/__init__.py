"""Measurements that help to choose a method's settings for a model and a device."""

import importlib
from typing import Any

_MODULES = {
    "LayerFisher": "fisher_factors",
    "Rates": "rates",
    "TpuReport": "tpu_steps",
    "cost_model": "projection",
    "fisher": "fisher_factors",
    "gradient_error": "gradient_errors",
    "kernel_rank": "kernel_ranks",
    "layer_shapes": "exchanges",
    "measure_rates": "rates",
    "plot_cost_model": "projection",
    "plot_fisher": "fisher_factors",
    "plot_kernel_ranks": "kernel_ranks",
    "received": "exchanges",
    "split_dimension": "split_choice",
    "tensorflow_step_hlo": "tensorflow_steps",
    "tpu_compile": "tpu_steps",
    "tpu_table": "tpu_tables",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    # Late: measurements need what training does not. No module here may have the name of a function, which it would hide.
    if name in _MODULES:
        return getattr(importlib.import_module(f"keras_ngd.analysis.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
