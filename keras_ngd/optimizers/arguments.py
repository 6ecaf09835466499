"""What the arguments are that several methods share: written once, and put into each class's docstring when it is defined."""

import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any, TypeVar

import keras

# Where a docstring has this line, it lists all further arguments.
PLACE = "{{shared_arguments}}"

# An argument of Keras's SGD that no method takes.
NOT_TAKEN = ("gradient_accumulation_steps",)

# What has no meaning for methods on rows: an inverse belongs to the rows it was made of, and all workers hold these.
NOT_OF_ROWS = ("factor_interval", "inverse_interval", "stagger", "gradient_worker_fraction", "reduce_scatter")

SHARED = {
    # Of the methods.
    "momentum": "float in [0, 1): what is kept of the last step. Default 0.9.",
    "factor_decay": "float in [0, 1): how much of the statistics' running average an update keeps. The average has no start-up "
    "bias: after t updates its weights are proportional to `factor_decay ** age` and sum to 1. Default 0.95.",
    "factor_interval": "int or schedule: steps between updates of the statistics; see `interval_growth`. Default 10.",
    "inverse_interval": "int or schedule: steps between refreshes of the inverses; see `interval_growth`. Default 100.",
    "interval": "int or schedule: steps between updates; see `interval_growth`. Default 10.",
    "batch_size": "int, the largest batch that will be seen; smaller ones are exact, larger ones an error. Default None: room is "
    "made for the first batch, or for 128 examples where TensorFlow does not know its size (batches that do not divide the "
    "data), and of larger batches the leading examples are recorded, with the weight of all.",
    "weight_sharing": '`"expand"` (default) or `"reduce"`: how the positions of convolutions and sequences count.',
    "losses_per_example": "number of loss values an example contributes to the mean, such as the positions that a loss is "
    'averaged over. Default `"auto"`: read from the compiled loss, its reduction, masks and weights (attribute `loss_ratio`); 1 '
    "in training without one.",
    "fisher": "whose gradients the statistics are of. `'empirical'` (default): those of the data's labels; their squares vanish "
    "as the loss does, and are not its curvature. `'sampled'`: those of labels that are drawn from the model's own predictions, "
    "whose mean square is the Gauss-Newton matrix, the loss's curvature, so that a damping is in the units of the loss. In steps "
    "that record, the first examples of the batch have their labels drawn, and captured layers learn from the others.",
    "likelihood": 'what labels are drawn from with `fisher="sampled"`, where the loss is one of your own: `"categorical"`, '
    '`"bernoulli"`, `"gaussian"` or a `keras_ngd.fisher.Likelihood`; a dict of these by output, or a list by loss. Default None: '
    "read from the loss that the model is compiled with.",
    "statistics_fraction": "in (0, 1]: the share of each batch the statistics are of; with `fisher='sampled'` that whose labels "
    "are drawn. Methods on rows take it with that alone. Default None: 1, and 0.25 with `fisher='sampled'`.",
    "length_clip": "positive float, or None for none: bound on the squared length of a step in the metric that preconditions it, "
    "over the loss and the square of the largest learning rate so far: `nu = min(1, largest_rate / learning_rate "
    'sqrt(length_clip loss / <P, V>))`, for each layer and for all. Default `"auto"`: 0.4 for KFAC and THOR, None for others '
    "and where another bound is given.",
    "loss_clip": "positive float, or None for none: bound on what a step promises to take off the loss, as a share of the loss "
    'and for a learning rate of 1, for each layer and for all. Default `"auto"`: 1.0 for SKFAC, SNGD and HyLo, None for others '
    "and where another bound is given.",
    "kl_clip": "positive float: bound on the squared length of a step in the Fisher metric, whatever the loss is: `nu = "
    "min(1, sqrt(kl_clip / (learning_rate^2 sum of <P, V>)))`, under which steps that are clipped do not depend on the learning "
    "rate. Default None.",
    "fisher_scale": '`"loss"`: the Fisher matrix is divided by the loss (its running average), so that steps do not depend on '
    "the loss's units. The empirical Fisher matrix is a square of gradients: it falls with the square of the residuals, the "
    "loss's curvature does not. Of squared errors the quotient is the Gauss-Newton matrix, up to a constant. None: the empirical "
    'Fisher matrix itself. Default `"auto"`: `"loss"`, and None with `fisher="sampled"`.',
    "interval_growth": "positive float or None. An interval given as an int is at most this share of the steps so far, and at "
    "least 1: what a network is like changes fastest in its first steps. None: the interval itself from the first step on. "
    "Default 0.1.",
    "stagger": "bool: whether refreshes are spread over the steps of `inverse_interval`, so that no step is slow. Layers are "
    "divided into shares of about equal work, no more than there are steps, and each share has a step of its own in every "
    "interval. The first refresh is of all layers, and so is each whose interval is shorter than there are shares, as while it "
    "grows from 1. Default False: all layers at once.",
    "rest": '`"adam"` or `"sgd"`: the update rule of variables that no curvature describes. Default `"adam"`.',
    "rest_learning_rate": "float or `LearningRateSchedule`: its learning rate. Default None: a tenth of `learning_rate` for "
    '`"adam"`, `learning_rate` itself for `"sgd"`.',
    # Of the methods in eigenbases.
    "decomposition": 'how bases are renewed. `"qr"` (default): the first by an eigendecomposition, others by one step of '
    'orthogonal iteration, `Q <- qr(F Q)`, largest eigenvalues first; `"eigh"`: by an eigendecomposition every time.',
    "basis_tolerance": "float in [0, 1): a basis stays as it is where it still diagonalizes its factor, `|offdiag(Q^T F Q)| <= "
    "basis_tolerance |F|`. Default 0.01.",
    "split": "int or None: factors of more rows and columns are cut into diagonal blocks of this size, each with a basis of its "
    "own, as `keras_ngd.THOR` cuts them. Default 1024.",
    # Of several workers and devices.
    "communicator": '`"auto"` (default): Horovod where `horovod.tensorflow.init()` has started several processes; `"horovod"`, '
    '`"local"`, or a `keras_ngd.distributed.Communicator`.',
    "gradient_worker_fraction": "share of several workers that hold each layer's inverses; its product with their number must "
    "divide it, and 0 stands for one of them. Others get the layer's preconditioned gradient instead, at every step. With less "
    "than 1 (the default) inverses are not saved: training that goes on begins with a refresh.",
    "reduce_scatter": "whether statistics and the gradients of captured layers are summed up on their layers' owners alone, as "
    "in SP-NGD; for `gradient_worker_fraction=0`. Default False: on all workers. What is saved then needs the callback "
    "`keras_ngd.callbacks.GatherStatistics` on all workers.",
    "shard_state": "whether each device of the active `keras.distribution` (JAX) keeps and inverts a part of the statistics and "
    "inverses, in place of all of them. Default False.",
    "seed": 'int in [0, 2**12), of the labels that are drawn with `fisher="sampled"`. Default 0.',
    "not_captured": "how many kernels (trainable variables of two or more axes) `capture` left out. Written by `capture` and "
    "saved, so that the optimizer of a loaded model knows. Default None.",
    # Of Keras's SGD. What it clips is the preconditioned gradient.
    "nesterov": "bool: whether the step looks ahead, `W <- W + momentum m - learning_rate P`. Default False.",
    "weight_decay": "float, decoupled: at each step all weights lose this share of themselves times the learning rate. Default "
    "None.",
    "clipnorm": "float: largest norm of each variable's gradient, preconditioned where its layer is captured. Default None.",
    "clipvalue": "float: largest absolute value of each entry of these gradients. Default None.",
    "global_clipnorm": "float: largest norm of all these gradients together. Default None.",
    "use_ema": "bool: whether a running average of the weights is kept, which replaces them when `fit` ends. Default False.",
    "ema_momentum": "float: how much of that average a step keeps. Default 0.99.",
    "ema_overwrite_frequency": "int: steps after which the average replaces the weights during training, too. Default None.",
    "loss_scale_factor": "float: what losses are multiplied with against underflow; gradients and statistics are divided by it "
    "again. Default None.",
    "name": "str: what the optimizer's variables are named after. Default: the class's name in lower case.",
}


# Of the class that is decorated.
Class = TypeVar("Class", bound=type)


def taken(method: type) -> list[str]:
    """The names of the arguments that a class over `keras.optimizers.SGD` hands on to there, its own first."""
    names: dict[str, None] = {}
    kind: Any
    for kind in method.__mro__[: method.__mro__.index(keras.optimizers.SGD) + 1]:
        if "__init__" in vars(kind):
            parameters = inspect.signature(kind.__init__).parameters.values()
            names |= {p.name: None for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"}
    return [name for name in names if name not in NOT_TAKEN]


def listed(docstring: str, indentation: int = 8) -> list[str]:
    """The names of the arguments that a docstring describes, in lines such as `name: ...` and `name, other: ...`."""
    found = re.findall(
        rf"^ {{{indentation}}}(\w+(?:, \w+)*):", docstring.split("Args:\n")[1].split("\n\n")[0], re.MULTILINE
    )
    return [name for line in found for name in line.split(", ")]


def documented(*refused: str) -> Callable[[Class], Class]:
    """Decorator of methods: lists in the docstring, in place of `PLACE`, all arguments that it does not describe itself.

    Args:
        *refused: names of arguments that the method does not take, though a class it builds on does.
    """

    def document(method: Class) -> Class:
        # Python leaves docstrings out where it is called with -OO.
        docstring = method.__doc__ or ""
        place = re.search(rf"^( *){re.escape(PLACE)}$", docstring, re.MULTILINE)
        if place:
            indentation, names = place[1], taken(method)
            own = {*listed(docstring, len(indentation)), *refused}
            lines = [
                textwrap.fill(
                    f"{name}: {text}",
                    width=128,
                    initial_indent=indentation,
                    subsequent_indent=indentation + "    ",
                    break_long_words=False,
                    break_on_hyphens=False,
                )
                for name, text in SHARED.items()
                if name in names and name not in own
            ]
            method.__doc__ = docstring.replace(place[0], "\n".join(lines))
        return method

    return document
