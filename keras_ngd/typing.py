"""What the annotations of the package stand for where a class would say too little or too much. It imports nothing of ours.

Tensors and variables have no class that both backends share, and Keras ships no annotations, so that these names tell readers
more than they tell a type checker.
"""

from collections.abc import Callable
from typing import Any

from keras.optimizers.schedules import LearningRateSchedule

# A tensor of TensorFlow or JAX, symbolic or not, or a number where one would be cast to a tensor.
Tensor = Any

# A `keras.Variable`, or what stands for one where a step is traced.
Variable = Any

# The static shape of a tensor.
Shape = tuple[int, ...]

# What Keras takes for one: a name, a `keras.initializers.Initializer` or a function of shape and dtype.
Initializer = Any

# The arguments of an object, as `get_config` gives them and `from_config` takes them.
Config = dict[str, Any]

# One of Keras's stores of weights, which are read and written like dicts from numbers to arrays.
Store = Any

# What Keras gives to callbacks: an epoch's metrics by name, or nothing.
Logs = dict[str, Any] | None

# How a dimension is cut into blocks: pairs of how many there are of one size, and that size. See `linalg.diagonal`.
Parts = tuple[tuple[int, int], ...]

# A function of a shape, an initializer, a dtype and a name that makes a variable of an optimizer's state.
AddVariable = Callable[..., Variable]

# Arguments of optimizers: the learning rate, ...
RateLike = float | LearningRateSchedule | Callable[[], Any]

# ... the damping, ...
DampingLike = float | LearningRateSchedule

# ... the steps from one update to the next, ...
IntervalLike = int | LearningRateSchedule

# ... how many loss values an example contributes, `"auto"` where the compiled loss is to tell, ...
LossesPerExample = float | str

# ... and THOR's block size: one for all layers, by the layers' names, as a function of the layer, or `"auto"`.
SplitLike = int | str | dict[str, int | None] | Callable[[Any], int | None] | None
