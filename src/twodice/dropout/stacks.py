"""The stacks of a model: its lists of equal blocks, each with its owner and the row of the table it fits.

Reads structure only; which tensors are sites is for `sites`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from twodice.dropout.reading import asks_for_attention
from twodice.dropout.table import ABSENT, ATTENTION, FEED_FORWARD, FORMS, PRESENT, Form
from twodice.dropout.wrappers import at, join, module_at, unwrap, walk


@dataclass(frozen=True)
class Stack:
    """One run of layers.

    Attributes
    ----------
    name : str or None
        ``encoder`` or ``decoder`` where the model has both, else None.
    path : str
        Clean path of `owner`, the module whose list the blocks are.
    owner, base : nn.Module
        `base` is what takes the tokens: the owner, or the model around it.
    blocks : tuple of nn.Module
        The layers in their order, and `paths` their clean paths.
    form : Form or None
        The row of the table; None where none fits.
    config : object
        The config of `base`, None where it has none.
    """

    name: str | None
    path: str
    owner: nn.Module
    base: nn.Module
    blocks: tuple[nn.Module, ...]
    paths: tuple[str, ...]
    form: Form | None
    config: Any

    @property
    def count(self) -> int:
        """Number of layers."""
        return len(self.blocks)

    @property
    def time_first(self) -> bool:
        """Whether tensors are (T, B, C)."""
        return any(getattr(m, "batch_first", True) is False for m in self.blocks[0].modules())


def _holds(block: nn.Module, owner: nn.Module, condition: tuple[str, Any]) -> bool:
    path, wanted = condition
    found = at(owner, path[1:]) if path.startswith(".") else at(block, path)
    if wanted is PRESENT:
        return found is not None
    return found is None if wanted is ABSENT else found is wanted or found == wanted


def _fits(form: Form, blocks: tuple[nn.Module, ...], owner: nn.Module) -> bool:
    known = {path.partition(".")[0] for path in (*form.has, *form.may, *form.own)}
    for block in blocks:
        if any(module_at(block, path) is None for path in form.has):
            return False
        if not all(_holds(block, owner, condition) for condition in form.when):
            return False
        for name, child in block.named_children():
            if name not in known and any(True for _ in child.parameters()):
                return False
    return True


def _is_block(module: nn.Module) -> bool:
    """Whether a module of a list looks like a layer: something in it attends, or is named so."""
    if isinstance(module, nn.MultiheadAttention) or asks_for_attention(module):
        return False
    children = {name for name, _ in module.named_children()}
    if any(isinstance(m, nn.MultiheadAttention) or asks_for_attention(m) for m in module.modules()):
        return True
    return bool(children & set(ATTENTION)) and bool(children & set(FEED_FORWARD))


def _lists(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the lists of equal blocks, the innermost that still are lists of blocks."""

    def is_list(module: nn.Module) -> bool:
        if not isinstance(module, nn.ModuleList | nn.Sequential) or not len(module):
            return False
        blocks = [unwrap(block) for block in module.children()]
        return len({type(block) for block in blocks}) == 1 and all(_is_block(block) for block in blocks)

    lists = [(path, module) for path, module in walk(root) if is_list(module)]
    for path, module in lists:
        inner = [p for p, _ in lists if p.startswith(f"{path}.")]
        if not inner:
            yield path, module


def stacks_of(root: nn.Module) -> list[Stack]:
    """Return the stacks of a model, in its order."""
    paths = {path: module for path, module in walk(root)}
    where = {id(module): path for path, module in paths.items()}

    def above(path: str, steps: int) -> str:
        return path.rsplit(".", steps)[0] if path.count(".") >= steps else ""

    found: dict[str, tuple[Form | None, list[nn.Module]]] = {}
    for path, module in _lists(root):
        blocks = tuple(unwrap(block) for block in module.children())
        owner = above(path, 1)
        form = next((form for form in FORMS if _fits(form, blocks, paths[owner])), None)
        owner = above(owner, form.up) if form is not None and form.up else owner
        found.setdefault(owner, (form, []))[1].extend(blocks)
    result = []
    for owner, (form, listed) in found.items():
        base = owner
        while base and not hasattr(paths[base], "get_input_embeddings"):
            base = above(base, 1)
        if not hasattr(paths[base], "get_input_embeddings"):
            base = owner
        name = next((n for n in ("encoder", "decoder") if n in owner.split(".")), None)
        name = None if sum(name in other.split(".") for other in found) > 1 else name
        result.append(
            Stack(
                name if len(found) > 1 else None,
                owner,
                paths[owner],
                paths[base],
                tuple(listed),
                tuple(where[id(block)] for block in listed),
                form,
                getattr(paths[base], "config", None),
            )
        )
    return result


def common(stacks: list[Stack], root: nn.Module) -> tuple[str, nn.Module]:
    """Return (path, module) of what holds all stacks: the base of one, or what several bases lie in."""
    paths = {path: module for path, module in walk(root)}
    where = {id(module): path for path, module in paths.items()}
    bases = [where[id(stack.base)] for stack in stacks]
    if len(bases) == 1:
        return bases[0], paths[bases[0]]
    shared: list[str] = []
    for parts in zip(*(base.split(".") for base in bases), strict=False):
        if len(set(parts)) > 1 or not parts[0]:
            break
        shared.append(parts[0])
    path = join(*shared)
    return path, paths[path]
