"""modules.json -> which modules the texts of each task go through: the modules alone, or a Router's routes.

A Router parts texts by their task, such as "query" and "document".
"""

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxembed.errors import CorruptCheckpointError, UnsupportedModelError

__all__ = ["Entries", "Entry", "Routes", "last", "read_json", "read_routes"]

ROUTERS = ("Asym", "Router")
SIDES = ("query", "document")
"""The tasks that sentence-transformers' own methods name."""
OTHERS = frozenset(("image", "audio", "video", "message"))
"""Routes of these names are for inputs that are no texts."""

FOREIGN = {"custom_st.Transformer": "Transformer", "pylate.models.Dense.Dense": "Dense"}
"""Classes that are not sentence-transformers' own -> what they are: jina-embeddings-v3's, in a file of the checkpoint,
which hands the task to its encoder; PyLate's, which works on tokens."""


class Entry(NamedTuple):
    """One line of modules.json: what `kind_of` makes of the class path, and the module's folder."""

    kind: str
    folder: Path


Entries = tuple[Entry, ...]
"""The modules that a text goes through, the encoder first; empty for a folder without modules.json."""


class Routes(NamedTuple):
    """Where texts of each task go.

    Attributes:
        of: task -> modules; {"": modules} where there is no Router.
        default: the task of texts that name none; None where they are refused.
    """

    of: Mapping[str, Entries]
    default: str | None


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """A JSON object from a file; {} for an absent file when `optional`."""
    if not path.is_file():
        if optional:
            return {}
        raise CorruptCheckpointError(f"{path} is missing")
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise CorruptCheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CorruptCheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def read_routes(root: Path) -> Routes:
    """The routes of a folder: one named "" unless a Router stands in modules.json.

    The modules are run in the order of the list, whatever its `idx` say, as sentence-transformers does.

    Raises:
        CorruptCheckpointError: a file is malformed.
        UnsupportedModelError: more than one Router, or one that no text can go through.
    """
    path = root / "modules.json"
    if not path.is_file():
        return Routes({"": ()}, "")
    try:
        lines = json.loads(path.read_bytes())
        entries = tuple(Entry(kind_of(line["type"]), inside(root, line["path"])) for line in lines)
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpointError(f"{path} is no list of modules: {error!r}") from None
    if not entries:
        raise CorruptCheckpointError(f"{path} lists no modules")
    routers = [place for place, entry in enumerate(entries) if entry.kind in ROUTERS]
    if not routers:
        return Routes({"": entries}, "")
    if len(routers) > 1:
        raise UnsupportedModelError(f"{path} has {len(routers)} Router modules; supported: one")
    place = routers[0]
    before, after = entries[:place], entries[place + 1 :]
    inner, default = read_router(entries[place].folder)
    return Routes({task: (*before, *middle, *after) for task, middle in inner.items()}, default)


def read_router(folder: Path) -> Routes:
    """A Router's own routes, those that texts can go through.

    Raises:
        CorruptCheckpointError: its file is malformed.
        UnsupportedModelError: it routes images or the like alone.
    """
    path = folder / "router_config.json"
    # Up to version 4 the class was called Asym, and the file so.
    path = path if path.is_file() else folder / "config.json"
    given = read_json(path)
    try:
        kinds = {name: kind_of(kind) for name, kind in given["types"].items()}
        routes = {
            str(route): tuple(Entry(kinds[name], inside(folder, name)) for name in names)
            for route, names in given["structure"].items()
        }
        parameters = dict(given.get("parameters") or {})
        mappings = {ast.literal_eval(key): route for key, route in (parameters.get("route_mappings") or {}).items()}
        for_text = {str(task) for task, kind in mappings if task is not None and kind in (None, "text")}
        for_others = OTHERS | {mappings[task, kind] for task, kind in mappings if kind not in (None, "text")}
        named = parameters.get("default_route")
        if not routes or not {*mappings.values(), *([] if named is None else [named])} <= routes.keys():
            raise ValueError("it names a route that it does not have")
    except (KeyError, TypeError, AttributeError, ValueError, SyntaxError) as error:
        raise CorruptCheckpointError(f"{path} is no Router configuration: {error!r}") from None
    if named is None and parameters.get("allow_empty_key", True):
        named = next(iter(routes))
    tasks = (*(route for route in routes if route not in for_others), *sorted(for_text), *SIDES)
    ways = {task: way(task, routes, mappings) for task in dict.fromkeys(tasks)}
    found = {task: route for task, route in ways.items() if route is not None}
    default = way(None, routes, mappings) or named
    if default is not None and found.setdefault(default, default) != default:
        raise UnsupportedModelError(f"{path}: texts of no task take the route {default!r}, which no task leads to")
    if not found:
        raise UnsupportedModelError(f"{path} has no route for texts, only {', '.join(routes)}")
    return Routes({task: routes[route] for task, route in found.items()}, default)


def way(task: str | None, routes: Mapping[str, Any], mappings: Mapping[Any, str]) -> str | None:
    """The route that sentence-transformers' Router gives texts of a task; None where it has none for it."""
    for key in ((task, "text"), (task, None), (None, "text"), (None, None)):
        if key in mappings:
            return mappings[key]
    return next((name for name in (task, "text") if name in routes), None)


def kind_of(path: Any) -> str:
    """What a module is: the class's name for sentence-transformers' own, else the whole class path.

    Their namespace changed: `sentence_transformers.models.Pooling` up to version 5, and
    `sentence_transformers.sentence_transformer.modules.pooling.Pooling` from 6. Somebody else's Pooling may compute
    something else.
    """
    path = str(path)
    return last(path) if path.startswith("sentence_transformers.") else FOREIGN.get(path, path)


def last(kind: Any) -> str:
    """The last part of a class path."""
    return str(kind).rsplit(".", 1)[-1]


def inside(root: Path, name: Any) -> Path:
    """A folder that another file names; it must stay inside.

    Raises:
        ValueError: it does not.
    """
    folder = root / str(name)
    if not folder.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{name!r} leads out of the folder")
    return folder
