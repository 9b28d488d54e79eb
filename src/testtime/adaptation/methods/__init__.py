"""The methods, one file each: a file dropped in here is found by its name alone."""

import importlib
import pkgutil

from testtime._suggest import suggest
from testtime.adaptation.core import Method


def _discover() -> dict[str, type[Method]]:
    found: dict[str, type[Method]] = {}
    names = sorted(file.name for file in pkgutil.iter_modules(__path__))
    for name in names:
        if name.startswith("_"):
            continue
        module = importlib.import_module(f"{__name__}.{name}")
        for value in vars(module).values():
            own = isinstance(value, type) and value.__module__ == module.__name__
            if own and issubclass(value, Method):
                found[value.name] = value
    return found


METHODS: dict[str, type[Method]] = _discover()


def find(method: Method | str) -> Method:
    """Return the method, or the one of that name with its defaults.

    Raises:
        TypeError: it is neither a method nor a name.
        ValueError: no method has that name.
    """
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):
        hint = f" Call it: {method.__name__}()." if isinstance(method, type) else ""
        raise TypeError(
            f"The method must be a Method or the name of one, but {method!r} was given.{hint}"
        )
    if method.lower() not in METHODS:
        raise ValueError(
            f"There is no method '{method}' (known: {', '.join(METHODS)})."
            f"{suggest(method, METHODS)}"
        )
    return METHODS[method.lower()]()
