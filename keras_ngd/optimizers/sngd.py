"""SNGD: natural gradient by the Sherman-Morrison-Woodbury identity."""

from typing import Any

import keras

from keras_ngd.curvature import KernelCurvature
from keras_ngd.curvature.curvature import Curvature
from keras_ngd.curvature.kernel_inverse import KERNEL_DAMPING_MODES
from keras_ngd.optimizers.arguments import NOT_OF_ROWS, documented
from keras_ngd.optimizers.blocks import Group
from keras_ngd.optimizers.row_method import RowMethod
from keras_ngd.optimizers.settings import settled_damping
from keras_ngd.statistics import RowStatistics
from keras_ngd.statistics.statistics import Statistics
from keras_ngd.typing import Config, DampingLike, IntervalLike, LossesPerExample, RateLike

# Where no damping is given, in mean eigenvalues of each layer's kernel matrix. Measured: at 1, a Transformer classifier and a
# deep autoencoder end at higher losses, at rates of 0.02 to 0.1.
RELATIVE_DAMPING = 0.3


@keras.saving.register_keras_serializable("keras_ngd")
@documented("factor_decay", *NOT_OF_ROWS)
class SNGD(RowMethod):
    """The natural gradient with the Fisher matrix of the batch itself, layer by layer, without ever forming it.

    For every captured layer with gradient `V`, and with one row of `a` and `g` per example (see
    `keras_ngd.statistics.RowStatistics`), whose outer products are the rows of `U`:

        P = (U^T U + damping I)^-1 V = (V - U^T (U U^T + damping I)^-1 U V) / damping

    (HyLo, eq. 7, where a factor 1/m is lost), followed by KFAC's clip and step. `U^T U` is the empirical Fisher block of the
    batch for dense layers, and HyLo's eq. 11 for layers with several positions. `U U^T = (a a^T) o (g g^T)` has one row per
    example: the cost is that of the batch size cubed and does not depend on the layer's.

    ```python
    optimizer = keras_ngd.SNGD()
    keras_ngd.capture(model, optimizer)
    model.compile(optimizer=optimizer, loss="sparse_categorical_crossentropy")
    model.fit(x, y)
    ```

    Args:
        learning_rate: float, `LearningRateSchedule` or callable. Default 0.02.
        damping: positive float or `LearningRateSchedule`: what is added to the curvature; `damping_mode` says in which units. In
            float32, keep it above a ten-thousandth of the kernel matrices' largest eigenvalues. Default None: 0.3, relative.
        damping_mode: `"relative"`: in units of the mean eigenvalue of each layer's kernel matrix; `"absolute"`: in those of the
            curvature. Default None: `"relative"` where `damping` is not given, else `"absolute"`.
        interval: int or schedule: steps between updates; in between, the last recorded batch's curvature is used. At 1, a
            gradient is preconditioned with the curvature of the very batch that it comes from, which takes less noise out of
            it. Default 10.
        {{shared_arguments}}

    Reference:
        - [Mu et al., 2022](https://doi.org/10.1109/SC41404.2022.00053), the HyLo paper, sections III and V
        - [Ren & Goldfarb, 2019](https://arxiv.org/abs/1906.02353)
    """

    def __init__(
        self,
        learning_rate: RateLike = 0.02,
        damping: DampingLike | None = None,
        momentum: float = 0.9,
        interval: IntervalLike = 10,
        batch_size: int | None = None,
        losses_per_example: LossesPerExample = "auto",
        kl_clip: float | None = None,
        damping_mode: str | None = None,
        name: str = "sngd",
        **kwargs: Any,
    ) -> None:
        damping, damping_mode = settled_damping(
            damping, damping_mode, "absolute", "relative", {"relative": RELATIVE_DAMPING}
        )
        if damping_mode not in KERNEL_DAMPING_MODES:
            raise ValueError(
                f"`damping_mode` must be one of {KERNEL_DAMPING_MODES}. Received: damping_mode={damping_mode!r}"
            )
        if "factor_decay" in kwargs:
            raise ValueError(f"{type(self).__name__} averages nothing, so it takes no `factor_decay`.")
        super().__init__(
            learning_rate,
            damping,
            interval,
            batch_size,
            losses_per_example,
            momentum=momentum,
            kl_clip=kl_clip,
            name=name,
            **kwargs,
        )
        self.damping_mode = damping_mode

    default_damping = RELATIVE_DAMPING

    def make_statistics(self, layer: keras.layers.Layer) -> Statistics:
        return RowStatistics(self.capacity, self.losses_in_statistics, self.strict)

    def make_curvature(self, group: Group) -> Curvature:
        block = group.blocks[0]
        return KernelCurvature(
            group.count,
            self.combined_shapes(block)[0][1],
            block.shape[2],
            block.shape[0] + block.shape[1],
            self.damping_mode,
        )

    def get_config(self) -> Config:
        return {**super().get_config(), "damping_mode": self.damping_mode}
