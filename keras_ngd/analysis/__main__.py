"""Command line of `keras_ngd.analysis`.

    python -m keras_ngd.analysis split_dimension --model resnet50
    python -m keras_ngd.analysis cost_model --model resnet50
    KERAS_BACKEND=jax python -m keras_ngd.analysis tpu_compile --model resnet50 --method kfac,thor

`python -m keras_ngd.analysis cost_model --help` lists what a command can be told.
"""

import importlib
import sys

from absl import app, flags

# Not modules of the functions' names: an imported module takes its name in the package, and hides the function.
COMMANDS = {"cost_model": "cost_command", "split_dimension": "split_command", "tpu_compile": "tpu_command"}


def main():
    """Runs the command that the first argument names."""
    name, arguments = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if name in ("-h", "--help", "help"):
        print(__doc__)
        return
    if name not in COMMANDS:
        message = f"The first argument must be a command: {', '.join(COMMANDS)}. Received: {name!r}"
        raise SystemExit(f"{__doc__}\n{message}")
    command = importlib.import_module(f"keras_ngd.analysis.{COMMANDS[name]}")
    command.define_flags()
    # For `--help`: it prints this module's docstring, and its own flags.
    sys.modules["__main__"].__doc__ = command.__doc__
    flags.adopt_module_key_flags(command)
    app.run(command.main, [sys.argv[0], *arguments])


if __name__ == "__main__":
    main()
