"""What a tree of settings takes, read off its types: names, intervals, and what is wrong with a value.

The bounds stand in the types and nowhere else, so the words of an error come from there and not from the
library that checks them. Does not know which settings there are.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from twodice.errors import nearest

Tree = type[BaseModel]
_BOUNDS = ("gt", "ge", "lt", "le", "min_length")


def fields_of(tree: Tree, prefix: str = "") -> dict[str, FieldInfo]:
    """Every setting's dotted name and its field, in order of declaration."""
    found: dict[str, FieldInfo] = {}
    for name, field in tree.model_fields.items():
        inner = _table(field)
        found.update({prefix + name: field} if inner is None else fields_of(inner, f"{prefix}{name}."))
    return found


def nearest_field(name: str, tree: Tree) -> str:
    """``"; did you mean 'optimizer.lr'?"`` for a name that is none, or an empty string."""
    known = fields_of(tree)
    by_leaf = {path.rpartition(".")[2]: path for path in known}
    leaf = name.rpartition(".")[2]
    if leaf in by_leaf:
        return f"; did you mean {by_leaf[leaf]!r}?"
    return nearest(name, known) or nearest(leaf, [*by_leaf, *tree.model_fields])


def in_words(error: ValidationError, tree: Tree) -> str:
    """One line: each field with what must hold of it, and what came."""
    said: dict[str, str] = {}
    for detail in error.errors():
        names = _names_in(tree, detail["loc"])
        path = ".".join(names)
        if detail["type"] == "extra_forbidden":
            said[path] = f"no setting {path!r}{nearest_field(path, tree)}"
        elif detail["type"] == "value_error" or not names:
            message = detail["msg"].removeprefix("Value error, ")
            said[path] = f"{path}: {message}" if path else message
        else:
            said[path] = f"{path} must be {_allowed(tree, names)}; got {detail['input']!r}"
    # What is wrong in a list is said once, of its member.
    return "; ".join(text for path, text in said.items() if not any(p.startswith(f"{path}.") for p in said))


def _table(field: FieldInfo) -> Tree | None:
    """The tree below a field that holds one."""
    return next((kind for kind in _members(field.annotation) if _is_tree(kind)), None)


def _members(annotation: Any) -> Iterable[Any]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _is_tree(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _names_in(tree: Tree, loc: Iterable[Any]) -> list[str]:
    """A path without what names a member of a union: names of settings, and the places in a list."""
    names: list[str] = []
    at: Tree | None = tree
    for part in loc:
        if isinstance(part, int):
            names.append(str(part))
        elif at is not None:
            names.append(part)
            at = _table(at.model_fields[part]) if part in at.model_fields else None
        elif len(names) == 1 and get_origin(tree.model_fields[names[0]].annotation) is dict:
            names.append(part)
    return names


def _allowed(tree: Tree, names: list[str]) -> str:
    """What the field at this path takes, with its interval."""
    at, field = tree, None
    for name in names:
        if name in at.model_fields:
            field = at.model_fields[name]
            at = _table(field) or at
    if field is None or _table(field) is not None:
        return "a table"
    parts, bounds = [field.annotation, *field.metadata], {}
    for part in parts:  # grows while it is read: a bound may stand deep in the type
        if get_origin(part) is Literal:
            return f"one of {', '.join(map(str, get_args(part)))}"
        parts += [*get_args(part), *getattr(part, "metadata", ())]
        bounds.update({n: v for n in _BOUNDS if (v := getattr(part, n, None)) is not None})
    kind = get_origin(field.annotation)
    if kind is dict or not {int, float, str}.intersection(p for p in parts if isinstance(p, type)):
        return "a table"
    one = "an integer" if int in parts else "a number" if float in parts else "text"
    if "ge" in bounds or "gt" in bounds:
        low = f"[{_bound(bounds['ge'])}" if "ge" in bounds else f"({_bound(bounds['gt'])}"
        high = next((_bound(bounds[n]) + end for n, end in (("le", "]"), ("lt", ")")) if n in bounds), "inf)")
        one = f"{one} in {low}, {high}"
    if kind is tuple and not names[-1].isdigit():
        least = f" of at least {bounds['min_length']}" if "min_length" in bounds else ""
        return f"a list{least}, each {one}"
    return one


def _bound(value: float) -> str:
    size = abs(int(value))
    if size >= 2**31 and size & (size - 1) == 0:
        return f"{'-' if value < 0 else ''}2^{size.bit_length() - 1}"
    return f"{value:g}"
