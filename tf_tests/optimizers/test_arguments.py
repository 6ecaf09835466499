"""Docstrings that are filled in with what several methods share."""

import inspect

import keras
import pytest

from keras_ngd import optimizers
from keras_ngd.optimizers.arguments import PLACE, SHARED, documented, listed, taken


def test_a_docstring_lists_what_it_does_not_describe_itself():
    @documented("clipnorm")
    class Method(keras.optimizers.SGD):
        """A method.

        Args:
            momentum, own: described here, over
                two lines: with a colon.
            {{shared_arguments}}

        Attributes:
            nesterov: not an argument here.
        """

        def __init__(self, own, momentum=0.0, rest="adam", **kwargs):
            super().__init__(momentum=momentum, **kwargs)

    assert {"own", "momentum", "rest", "nesterov", "clipnorm", "learning_rate"} < set(taken(Method))
    assert "gradient_accumulation_steps" not in taken(Method)
    found = listed(inspect.getdoc(Method), indentation=4)
    # What is neither described nor shared is left out, such as the learning rate.
    expected = [n for n in SHARED if n in taken(Method) and n not in ("momentum", "clipnorm")]
    assert found == ["momentum", "own", *expected]
    assert f"rest: {SHARED['rest'][:20]}" in Method.__doc__
    assert PLACE not in Method.__doc__
    assert max(len(line) for line in Method.__doc__.splitlines()) <= 128


def test_without_docstrings():
    """As under `python -OO`."""

    class Method(keras.optimizers.SGD):
        pass

    Method.__doc__ = None
    assert documented()(Method) is Method
    assert Method.__doc__ is None


@pytest.mark.parametrize("name", optimizers.__all__)
def test_no_place_is_left_unfilled(name):
    assert PLACE not in (getattr(optimizers, name).__doc__ or "")


def test_every_text_is_of_use():
    methods = [m for m in vars(optimizers).values() if isinstance(m, type)]
    assert {name for method in methods for name in taken(method)} >= set(SHARED)
