"""Scalars for TensorBoard. TensorFlow writes them, whichever backend trains."""

import importlib.util
import os
from collections.abc import Mapping


class ScalarWriter:
    """Writes scalars into a folder for TensorBoard.

    Args:
        log_dir: the folder.

    Raises:
        ImportError: if TensorFlow or TensorBoard is not installed.
    """

    def __init__(self, log_dir: str | os.PathLike) -> None:
        for module, package in (
            ("tensorflow", "TensorFlow, which writes its files"),
            ("tensorboard", "TensorBoard"),
        ):
            if importlib.util.find_spec(module) is None:
                raise ImportError(f"`log_dir` needs {package}: `pip install {module}`. Received: log_dir={log_dir!r}")
        import tensorflow as tf

        self._writer = tf.summary.create_file_writer(str(log_dir))

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        """Writes a dict from names to numbers."""
        import tensorflow as tf

        with self._writer.as_default(step=step):
            for name, value in scalars.items():
                tf.summary.scalar(name, value)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
