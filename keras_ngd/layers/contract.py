"""What shapes the methods of a geometry give: stated where they are declared, and checked wherever they are called.

Geometries of a user's are the part of a layer of one's own that shows first where it is wrong, in whatever a backend says of
tensors that do not fit: somewhere in a product, far from what made them. Shapes are looked at while a function is traced, so a
step that runs takes no notice.
"""

import functools
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from keras_ngd import backend
from keras_ngd.typing import Parts, Tensor, Variable

if TYPE_CHECKING:
    from keras_ngd.layers.captured import Part
    from keras_ngd.layers.geometry import Geometry

Method = TypeVar("Method", bound=Callable[..., Any])

# What backends raise of shapes that do not fit.
ERRORS = (ValueError, TypeError, IndexError)

# Geometries and the shapes of parameters that they make a matrix of and back.
_AGREEING: set[Any] = set()


def gives(expected: Callable[..., Any], name: str | None = None) -> Callable[[Method], Method]:
    """A decorator of a geometry's method, whose results are to have the shapes `expected(geometry, *arguments)`.

    Shapes are as `backend.agrees` takes them. What overrides the method is checked, too: see `check_overriding`.
    """

    def decorate(method: Any) -> Any:
        called = method.__name__ if name is None else name

        @functools.wraps(method)
        def checked(geometry: Any, *args: Any, **kwargs: Any) -> Any:
            found = _called(geometry, called, method, *args, **kwargs)
            backend.check_shapes(found, expected(geometry, *args, **kwargs), _named(geometry, called))
            return found

        checked.gives = expected  # type: ignore[attr-defined]
        return checked

    return decorate


def axes(*names: str) -> Callable[..., Any]:
    """The shape of one tensor, for `gives`.

    Sizes are the geometry's attributes of these names, `examples` that of the first axis of what the method is given, and other
    names stand for any size.
    """

    def expected(geometry: Any, given: Any = None, *_: Any, **__: Any) -> tuple[Any, ...]:
        shape = backend.static_shape(given)
        sizes = {"examples": shape[0]} if shape and shape[0] is not None else {}
        return tuple(sizes.get(name, getattr(geometry, name, name)) for name in names)

    return expected


def each(*expected: Callable[..., Any]) -> Callable[..., Any]:
    """Those of several tensors, for `gives`."""
    return lambda *given, **named: [of_one(*given, **named) for of_one in expected]


def blocks(geometry: Any, parts: Parts) -> list[Any]:
    """The shapes of diagonal blocks, by part, for `gives`."""
    return [(geometry.groups, count, size, size) for count, size in parts]


def check_overriding(cls: type) -> None:
    """Has the methods of a class checked that override those which `gives` decorates."""
    stated = {n: f.gives for base in reversed(cls.__mro__) for n, f in vars(base).items() if hasattr(f, "gives")}
    for name, expected in stated.items():
        if not hasattr(getattr(cls, name), "gives"):
            setattr(cls, name, gives(expected, name)(getattr(cls, name)))


def _called(geometry: Any, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`method(geometry, *args)`, the geometry's of this name, whose failures say which it was and what it was given."""
    try:
        return method(geometry, *args, **kwargs)
    except backend.WrongShape:
        raise
    except ERRORS as error:
        given = ", ".join(backend.shown(a) for a in args if hasattr(a, "shape") or isinstance(a, list))
        raise backend.WrongShape(f"{_named(geometry, name)} fails on the shape {given}: {error}") from error


def _named(geometry: Any, name: str) -> str:
    return f"`{name}` of its {type(geometry).__name__}"


def parts_of(path: str, kind: Any, layer: Any) -> "Mapping[str, Part] | str":
    """The parts of a built layer, or what its kind says of why it has none.

    Args:
        path: the layer's.
        kind: the class that it is captured as.
        layer: the layer, captured or plain.

    Raises:
        ValueError: unless these are parts whose geometries make matrices of their parameters and back.
    """
    try:
        parts = kind.parts(layer)
    except ValueError as error:
        return str(error)
    except (*ERRORS, AttributeError) as error:
        raise ValueError(of_layer(path, kind, f"its `parts` fails: {error}")) from error
    try:
        names = list(parts) if isinstance(parts, Mapping) else []
        if names[:1] != ["statistics"] or not all(name.endswith("_statistics") for name in names[1:]):
            raise backend.WrongShape(
                f"its `parts` gives {names or parts!r}, where a dict was expected whose first name is 'statistics' and whose "
                "others end in '_statistics'"
            )
        for geometry, parameters in parts.values():
            _check_part(geometry, parameters)
    except backend.WrongShape as error:
        raise ValueError(of_layer(path, kind, error)) from error
    return parts


def _check_part(geometry: "Geometry", parameters: Sequence[Variable]) -> None:
    kind = type(geometry).__name__
    for name in ("groups", "input_dim", "output_dim"):
        size = getattr(geometry, name, None)
        if not isinstance(size, numbers.Integral) or size < 1:
            raise backend.WrongShape(f"`{name}` of its {kind} is {size!r}, where an int of at least 1 was expected")
    if any(parameter is None for parameter in parameters):
        raise backend.WrongShape(
            f"its `parts` gives None as a parameter of its {kind}; `Part.of(geometry, ...)` leaves out what a layer lacks"
        )
    shapes = [tuple(parameter.shape) for parameter in parameters]
    key = (type(geometry), geometry.key, *shapes)
    if key in _AGREEING:
        return

    made = f"{_named(geometry, 'from_matrix')}, of {[parameter.name for parameter in parameters]},"

    def there_and_back(*tensors: Tensor) -> None:
        matrix = geometry.to_matrix(list(tensors))
        back = _called(geometry, "from_matrix", type(geometry).from_matrix, matrix)
        backend.check_shapes(back, shapes, made)

    backend.without_computing(there_and_back, shapes, [backend.dtype_name(parameter) for parameter in parameters])
    _AGREEING.add(key)


def of_layer(path: str, kind: type, error: object) -> str:
    """What to say of what is wrong with a layer's geometry, or with what its statistics made of it."""
    return (
        f'Layer {path!r} cannot be captured as {kind.__name__}: {error}. Correct that class, or its geometry: "Adding a kind of '
        f'layer" in CONTRIBUTING.md has an example. Or leave the layer out: `keras_ngd.capture(model, optimizer, '
        f"skip=[{path!r}])`."
    )
