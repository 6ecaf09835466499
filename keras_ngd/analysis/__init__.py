"""Measurements that help to choose a method's settings for a model and a device."""

__all__ = ["split_dimension"]


def __getattr__(name):
    # Late, so that `python -m keras_ngd.analysis.split_dimension` does not import its module twice.
    if name == "split_dimension":
        from keras_ngd.analysis.split_choice import split_dimension

        return split_dimension
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
