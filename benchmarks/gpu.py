"""Step costs on a GPU, with JAX: as `benchmarks.costs`, on networks of the size that GPUs are for.

On a machine without a network, from the root of the repository, with wheels of what is missing there:

    benchmarks/on_gpu.sh keras.whl namex.whl optree.whl tqdm.whl
"""

from benchmarks import costs
from benchmarks.methods import METHODS

environment, table, plot = costs.environment, costs.table, costs.plot
# A process that is stopped keeps its part of the GPU.
AT_ONCE = 1


def cases(quick):
    """One for each network."""
    networks = ("3c1f",) if quick else ("resnet50-224", "resnet18", "resnet32", "unet", "transformer")
    settings = {"rounds": 3, "seconds": 0} if quick else {"rounds": 10, "seconds": costs.SECONDS}
    return [
        {"name": network, "network": network, "mode": "jax", "methods": list(METHODS), **settings}
        for network in networks
    ]


def measure(case):
    """As for `benchmarks.costs`.

    Raises:
        RuntimeError: where JAX sees no GPU.
    """
    import jax

    if jax.default_backend() != "gpu":
        raise RuntimeError(
            f"This benchmark is for a GPU, but JAX runs on {jax.devices()}. On a CPU: python -m benchmarks costs"
        )
    return costs.measure(case) | {"device": jax.devices()[0].device_kind}
