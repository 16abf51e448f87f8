"""Networks of the user's own code, ``module:callable``: looked up, and known by their file."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from understudy.artifacts import file_hash
from understudy.errors import ModelError, problem
from understudy.models.catalog import CATALOG, PREFIXES

# By the id of a callable: itself, so that no other one gets its id, and the hash of its file when
# it was looked up first. What runs is the code of that moment, whatever the file holds later.
_SEEN: dict[int, tuple[Any, str | None]] = {}


def is_own_code(name: str) -> bool:
    """Return whether a model's name has the form ``module:callable``."""
    source, colon, _ = name.partition(":")
    is_other = name in CATALOG or source in PREFIXES or name.endswith(".onnx")
    return bool(colon) and not is_other


def code_hash(name: str) -> str | None:
    """Return the SHA-256 of the file that a ``module:callable`` is written in.

    None for a model of another kind, and for a callable that no file is known of. What that file
    imports does not count: there is no telling where the user's code ends.

    Raises:
        ModelError: there is no such callable, or its module cannot be imported.
    """
    if not is_own_code(name):
        return None
    return _SEEN[id(own_callable(name))][1]


def own_callable(name: str) -> Callable[..., Any]:
    """Return what ``module:callable`` names.

    Raises:
        ModelError: the module cannot be imported, whatever it raises, or has no such callable.
    """
    module_name, _, attribute = name.partition(":")
    module = _imported(module_name, name)
    make: Callable[..., Any] | None = getattr(module, attribute, None)
    if make is None or not callable(make):
        given = "has no" if make is None else "is not callable:"
        found = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise ModelError(
            problem(
                f"model '{name}': module '{module_name}' {given} '{attribute}'",
                expected=f"one of its callables, such as {', '.join(found[:5]) or '(it has none)'}",
                mend="Name a function or class that returns a torch.nn.Module.",
            )
        )
    if id(make) not in _SEEN:
        file = _file_of(make, module)
        _SEEN[id(make)] = (make, None if file is None else file_hash(file))
    return make


def _imported(module_name: str, name: str) -> ModuleType:
    # A console script does not look there by itself. Last, so that nothing installed is hidden.
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.append(folder)
    try:
        return importlib.import_module(module_name)
    # User code may raise anything, and a script without a main guard may end the process.
    except (Exception, SystemExit) as error:
        place = _place_of(error)
        if isinstance(error, ModuleNotFoundError):
            raise ModelError(
                problem(
                    f"model '{name}': {error}{place}",
                    expected="a module that Python can import",
                    mend="Install its package, or run in the folder that it lies in.",
                )
            ) from error
        text = error.msg if isinstance(error, SyntaxError) else error
        raise ModelError(
            problem(
                f"model '{name}': importing '{module_name}' raised {type(error).__name__}: "
                f"{text}{place}",
                expected="a module that Python can import",
                mend="Correct it there.",
            )
        ) from error


def _place_of(error: BaseException) -> str:
    """Return file and line that an import failed at in words; an empty string: not known."""
    if isinstance(error, SyntaxError) and error.filename:
        line = "" if error.lineno is None else f", line {error.lineno}"
        return f" ({error.filename}{line})"
    # The last module that was being imported, and not the depths of what it called.
    places = [
        f" ({frame.f_code.co_filename}, line {line})"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_name == "<module>"
    ]
    return places[-1] if places else ""


def _file_of(make: Callable[..., Any], module: ModuleType) -> Path | None:
    """Return the file of a callable's source, of one without such as a partial its module's."""
    item: Any
    for item in (make, module):
        try:
            found = inspect.getsourcefile(inspect.unwrap(item))
        except (TypeError, OSError, ValueError):  # it has none, or none can be told
            continue
        if found is not None and Path(found).is_file():
            return Path(found)
    return None
