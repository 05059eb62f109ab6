"""Functions of the user, by import path."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any


def import_function(path: str) -> Callable[..., Any]:
    """Return the function `package.module:name`; modules are found from the working directory too.

    Raises:
        ValueError: if there is no such module, or nothing callable of that name in it.
    """
    module_name, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise  # the module is there, and what it imports is not
        raise ValueError(
            f"a function must be in an importable module, got {path!r}: no module {error.name!r}; "
            "modules start at the working directory"
        ) from error
    found = vars(module).get(name)
    if not callable(found):
        known = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise ValueError(f"a function must exist, got {path!r}; {module_name} has {', '.join(known) or 'none'}")
    return found
