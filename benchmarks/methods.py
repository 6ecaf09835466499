"""The optimizers that costs are measured of, as users would set them."""

ROW_METHODS = ("skfac", "sngd", "hylo-kid", "hylo-kis")
# In the eigenbases of factors: how often each rotates a matrix in a step.
ROTATIONS = {"ekfac": 2, "eigen-adam": 2}
METHODS = ("adam", "muon", "kfac", *ROTATIONS, "thor", *ROW_METHODS)
# What a method's step is compared with where goals are asked, if not with SGD's.
BESIDE = {"eigen-adam": "adam"}
DAMPING = 0.1


def optimizer_of(method, network, **arguments):
    """A method's optimizer for a network, and the optimizer to capture the model for, or None.

    Args:
        method: `"sgd"`, `"captured"` (SGD on a model captured for KFAC) or one of `METHODS`.
        network: one of `benchmarks.networks.NETWORKS`.
        **arguments: of a method of second order, over those that all have here.
    """
    import keras

    import keras_ngd
    from benchmarks.networks import NETWORKS

    settings = NETWORKS[network]
    if method == "adam":
        return keras.optimizers.Adam(1e-3), None
    if method == "muon":
        return keras.optimizers.Muon(1e-3), None
    shared = {
        **keras_ngd.PAPER_SETTINGS,
        "learning_rate": 1e-3,
        "damping": DAMPING,
        "losses_per_example": settings.get("pixels", settings.get("positions", 1)),
        **arguments,
    }
    intervals = {"factor_interval": 1, "inverse_interval": 10}
    if method in ("sgd", "captured"):
        sgd = keras.optimizers.SGD(1e-3, momentum=0.9)
        return sgd, keras_ngd.KFAC(**shared) if method == "captured" else None
    if method == "kfac":
        optimizer = keras_ngd.KFAC(**shared, **intervals)
    elif method in ROTATIONS:
        # Every basis is renewed at every refresh: the whole price.
        intervals |= {"basis_tolerance": 0.0}
        if method == "ekfac":
            optimizer = keras_ngd.EKFAC(**shared, **intervals)
        else:
            optimizer = keras_ngd.EigenAdam(1e-3, interval_growth=None, **intervals, **arguments)
    elif method == "thor":
        # Every layer renews its inverses at every refresh: the whole price.
        optimizer = keras_ngd.THOR(**shared, **intervals, split=settings["split"], omega=(0, 0))
    else:
        shared |= {"interval": 10, "batch_size": settings["batch"]}
        if method.startswith("hylo"):
            optimizer = keras_ngd.HyLo(**shared, mode=method.split("-")[1], steps_per_epoch=10)
        else:
            optimizer = {"skfac": keras_ngd.SKFAC, "sngd": keras_ngd.SNGD}[method](**shared)
    return optimizer, optimizer
