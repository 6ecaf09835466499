"""Set-up shared by all tests; they run under whichever backend KERAS_BACKEND names."""

import gc
import os
import pathlib

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# NumPy's threads wait for each other by spinning, which can take most of the time of a test that runs beside others.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Most programs that JAX compiles here run once or twice: it should not take the time to make them fast.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# XLA makes each fused loop a program of its own unless it is told not to, which takes twice as long.
if os.environ["KERAS_BACKEND"] == "jax":
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

# Compiling takes most of the time on JAX, and many tests train the same small networks: what was compiled once is kept, for
# other tests, processes and runs. JAX tells programs apart by what they compute, its version and its settings.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import keras
import pytest
from hypothesis import settings

# Every shape drawn is compiled anew on JAX.
examples = 25 if keras.backend.backend() == "tensorflow" else 12
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=examples, database=None)
settings.load_profile("repeatable")


def pytest_configure(config):
    """Drops what TensorFlow logged while it was imported: pytest would print it after its summary."""
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None and config.getoption("capture") != "no":
        capture.read_global_capture()


def pytest_addoption(parser):
    parser.addoption(
        "--once",
        action="store_true",
        help="on TensorFlow, leave out what says the same on JAX, and there in half the time",
    )


def pytest_collection_modifyitems(config, items):
    """Leaves out what runs by night, unless `-m` names it: `-m ""` asks for all that a change must pass."""
    if "nightly" in config.option.markexpr:
        return
    once = config.getoption("--once") and keras.backend.backend() == "tensorflow"

    def left_out(item):
        # What JAX skips says something about TensorFlow, whatever else is in its file.
        elsewhere = once and item.get_closest_marker("neutral") and not item.get_closest_marker("skipif")
        return bool(item.get_closest_marker("nightly") or elsewhere)

    found = [item for item in items if left_out(item)]
    if found:
        items[:] = [item for item in items if not left_out(item)]
        config.hook.pytest_deselected(items=found)


def pytest_collection_finish(session):
    """What has been imported stays: it need not be looked through for garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_session():
    """Every test starts from the same seeds and leaves no Keras state behind."""
    keras.utils.set_random_seed(0)
    yield
    keras.backend.clear_session(free_memory=False)


@pytest.fixture(autouse=True, scope="module")
def fresh_programs():
    """No file leaves compiled programs behind: Linux lets a process have so many pieces of memory, and each has some."""
    yield
    if keras.backend.backend() == "jax":
        import jax

        jax.clear_caches()


@pytest.fixture
def float64():
    """Everything in double precision, for as long as the test runs."""
    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    if keras.backend.backend() == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)
    yield
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(policy)
    if keras.backend.backend() == "jax":
        jax.config.update("jax_enable_x64", False)
