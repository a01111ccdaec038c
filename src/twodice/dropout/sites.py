"""Where a model can drop units: the search for sites.

Reads a model, never changes it. Knows no rate of a plan and no key. A site's name is ``<module
path>#<kind>``; wrappers (data-parallel, compiled, checkpointed, adapters) are taken off by type and leave no
trace in a path. Which module of a block is which stands in `table`; own dropout is looked up in `own`.

Letters: B rows, T positions, C columns, H heads, S keys, E experts.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from twodice.dropout import own, table
from twodice.dropout.places import Family, Inventory, OwnDropout, Place
from twodice.dropout.reading import asks_for_attention
from twodice.dropout.stacks import Stack, common, stacks_of
from twodice.dropout.table import Branch
from twodice.dropout.weights import weights
from twodice.dropout.wrappers import at, join, module_at, unwrap, walk
from twodice.errors import ConfigError

__all__ = [
    "Family",
    "Inventory",
    "OwnDropout",
    "Place",
    "find",
    "first_tensor",
    "has_fast_path",
    "unwrap",
    "walk",
]


def find(model: nn.Module) -> Inventory:
    """Return the sites of a model and the dropout that it brings along.

    Raises
    ------
    ConfigError
        If the model holds two language models, or is of a form that cannot be served.
    """
    root = unwrap(model)
    modules = list(walk(root))
    stacks = stacks_of(root)
    found = _inventory(root, stacks)
    search = _Search(found, {id(module): path for path, module in modules})
    for stack in stacks:
        search.stack(stack)
    for path, module in modules:
        if isinstance(module, nn.MultiheadAttention) and not search.inside(path):
            search.multihead(module, path, None, None, None)
    weights(found, modules)
    own.collect(found, modules)
    if not stacks and getattr(root, "config", None) is not None:
        found.undecided.append(("", "no list of equal blocks that attend was found, so no layer has a site"))
    return found


def _inventory(root: nn.Module, stacks: list[Stack]) -> Inventory:
    if not stacks:
        return Inventory(root, root, None, None)
    _, base = common(stacks, root)
    configured = [stack for stack in stacks if stack.config is not None]
    config = getattr(base, "config", None)
    if len(configured) > 1 and config is None:
        raise ConfigError(
            "attach serves one language model at a time; found "
            f"{', '.join(repr(stack.path) for stack in configured)}; attach to each"
        )
    family = None
    if configured:
        asking = (m for stack in stacks for m in stack.blocks[0].modules() if asks_for_attention(m))
        family = Family(type(next(asking, base)).__module__, type(base).__name__)
    return Inventory(root, base if configured else root, family, max(s.count for s in stacks), stacks=stacks)


class _Search:
    """Fills an inventory from stacks."""

    def __init__(self, found: Inventory, where: dict[int, str]) -> None:
        self.found = found
        self.where = where

    def inside(self, path: str) -> bool:
        """Whether a path lies in a block of a stack."""
        return any(path.startswith(f"{block}.") for stack in self.found.stacks for block in stack.paths)

    def stack(self, stack: Stack) -> None:
        """Find the sites of a stack, in the order of the forward."""
        form, path = stack.form, stack.path
        flow = "tbc" if stack.time_first else "btc"
        first, tensor = stack.blocks[0], "input"
        if form is not None and form.embedding is not None:
            found = module_at(stack.owner, form.embedding[1:])
            first, tensor = (first, tensor) if found is None else (found, "output")
        for kind in ("embedding", "token"):
            self.found.add(kind, path, first, tensor, layout=flow, stack=stack.name)
        self._word(stack)
        if form is None:
            names = ", ".join(name for name, _ in first.named_children())
            why = f"its blocks ({type(stack.blocks[0]).__name__}: {names}) fit no form of the table"
            self.found.undecided.append((path, f"{why}: no site of residual and skip"))
        if form is not None and form.shared:
            why = f"{stack.count} block is visited by all layers: each visit has a mask of its own"
            self.found.undecided.append(
                (path, f"{why}, layers cannot be told apart, and 'output' has no site")
            )
        for layer, (block, here) in enumerate(zip(stack.blocks, stack.paths, strict=True)):
            if form is None:
                self._unknown(stack, layer, block, here, flow)
            else:
                for branch in form.branches:
                    if module_at(block, branch.at) is not None:
                        self._branch(stack, layer, block, branch, flow)
            if form is not None and form.first_counts and layer == 0:
                why = "the first block hands something to the others (position biases): no site of layer"
                self.found.undecided.append((here, why))
            else:
                self.found.add("layer", here, block, "block", layer=layer, layout=flow, stack=stack.name)
        self._output(stack, flow)
        if form is not None:
            own.of_form(self.found, stack, self.where)

    def _word(self, stack: Stack) -> None:
        lookup = getattr(stack.base, "get_input_embeddings", None)
        table_of_words = None
        if lookup is not None:
            try:
                table_of_words = lookup()
            except (AttributeError, NotImplementedError):
                table_of_words = None
        if isinstance(table_of_words, nn.Module):
            table_of_words = unwrap(getattr(table_of_words, "base_layer", table_of_words))
        if isinstance(table_of_words, nn.Embedding) and id(table_of_words) in self.where:
            path = self.where[id(table_of_words)]
            if not self.found.has(f"{path}#word"):
                self.found.add("word", path, table_of_words, "lookup", stack=stack.name)

    def _branch(self, stack: Stack, layer: int, block: nn.Module, branch: Branch, flow: str) -> None:
        found = self.found
        where = self.where
        rest: dict[str, Any] = {"layer": layer, "stack": stack.name}
        home = module_at(block, branch.at)
        assert home is not None
        path = where[id(home)]
        added = home if branch.added is None else module_at(block, branch.added)
        last = next((m for name in branch.last if (m := module_at(block, name)) is not None), None)
        layout = "nc" if branch.flat else flow
        if branch.part == "mlp":
            chunk = max(getattr(m, "chunk_size_feed_forward", 0) or 0 for m in (block, home))
            if chunk > 0:
                why = (
                    f"chunk_size_feed_forward={chunk} cuts positions into pieces: no site of the feed-forward"
                )
                found.undecided.append((path, why))
                return
            self._activation(home, last, path, layout, rest)
        else:
            asks = home if branch.asks is None else module_at(block, branch.asks)
            part = "cross" if branch.part == "cross" else None
            if isinstance(asks, nn.MultiheadAttention):
                self.multihead(asks, path, layer, part, stack.name)
            elif asks is not None:
                self._attention(asks, path, part, rest, block, branch)
                self._head(asks, last, path, part, layout, rest)
        if added is None:
            found.undecided.append((path, "the module whose result is added was not found"))
            return
        found.add("residual", path, added, "output", part=branch.part, layout=layout, **rest)
        scale = next((s for s in table.SCALES if getattr(block, s, 1.0) != 1.0), None)
        stream = None if branch.stream is None else module_at(block, branch.stream)
        strange = _unknown_dropout(stack, block)
        if stream is None or scale is not None or strange is not None:
            why = "the identity path is that of two branches"
            if scale is not None:
                why = f"{scale} scales the branch"
            elif strange is not None:
                why = f"{strange!r} may lie between the branch and the sum"
            found.undecided.append((path, f"{why}: no site of skip"))
            return
        extra = {"stream": stream, "stream_is": "input", "between": ()}
        found.add("skip", path, added, "skip", part=branch.part, layout=layout, extra=extra, **rest)

    def _attention(
        self,
        asks: nn.Module,
        path: str,
        part: str | None,
        rest: dict[str, Any],
        block: nn.Module | None = None,
        branch: Branch | None = None,
    ) -> None:
        found = self.found
        extra: dict[str, Any] = {"heads": heads(asks)}
        eager = getattr(sys.modules.get(type(asks).__module__), "eager_attention_forward", None)
        if asks_for_attention(asks) and eager is not None:
            extra["eager"] = eager
            found.add("attention", path, asks, "attention", part=part, layout="bhts", extra=extra, **rest)
            found.add("key", path, asks, "attention", part=part, layout="bhts", extra=extra, **rest)
            return
        dropped = None if branch is None or block is None else module_at(block, branch.weights or "?")
        if dropped is None or branch is None or block is None:
            why = (
                "its weights pass neither an attention function nor a known nn.Dropout: no site of attention"
            )
            found.undecided.append((path, why))
            return
        for condition, wanted in branch.weights_if:
            if at(block, condition) != wanted:
                got = f"{condition.removeprefix('config._').removeprefix('config.')}={at(block, condition)!r}"
                found.undecided.append(
                    (path, f"{got}: the weights do not pass {branch.weights!r}; no site of attention")
                )
                reads = condition.endswith("_attn_implementation")
                found.silent[id(dropped)] = None if reads else f"with {got} nothing reads it"
                return
        found.add("attention", path, dropped, "probabilities", part=part, layout="bhts", extra=extra, **rest)

    def _head(
        self,
        asks: nn.Module,
        last: nn.Module | None,
        path: str,
        part: str | None,
        layout: str,
        rest: dict[str, Any],
    ) -> None:
        number = heads(asks)
        if last is None or number is None:
            what = "output projection" if last is None else "number of heads"
            self.found.undecided.append((path, f"its {what} was not found: no site of head"))
            return
        self.found.add("head", path, last, "input", part=part, layout=layout, extra={"heads": number}, **rest)

    def _activation(
        self, home: nn.Module, last: nn.Module | None, path: str, layout: str, rest: dict[str, Any]
    ) -> None:
        experts = module_at(home, table.EXPERTS)
        if experts is None:
            if last is None:
                self.found.undecided.append((path, "its last linear was not found: no site of activation"))
                return
            self.found.add("activation", path, last, "input", layout=layout, **rest)
            return
        product = getattr(experts, "down_proj", None)
        inside = join(path, table.EXPERTS)
        if isinstance(product, nn.Parameter) and product.dim() == 3:
            turned = bool(getattr(experts, "is_transposed", False))
            extra = {"experts": product.shape[0], "width": product.shape[1 if turned else 2]}
            self.found.add("activation", inside, experts, "experts", layout="nc", extra=extra, **rest)
        else:
            self.found.undecided.append(
                (inside, "experts that are not stacked parameters: no site of activation")
            )
        for name in table.SHARED_EXPERTS:
            shared = module_at(home, f"{name}.down_proj")
            if shared is not None:
                self.found.add("activation", join(path, name), shared, "input", layout=layout, **rest)

    def multihead(
        self, module: nn.Module, path: str, layer: int | None, part: str | None, stack: str | None
    ) -> None:
        """Add the sites of an nn.MultiheadAttention, whose own forward hides them."""
        extra = {"heads": heads(module), "time_first": not getattr(module, "batch_first", False)}
        for kind in ("attention", "key", "head"):
            self.found.add(
                kind,
                path,
                module,
                "multihead",
                layer=layer,
                part=part,
                layout="bhts",
                stack=stack,
                extra=extra,
            )

    def _unknown(self, stack: Stack, layer: int, block: nn.Module, here: str, flow: str) -> None:
        """Find what names and structure tell of a block that fits no row."""
        rest: dict[str, Any] = {"layer": layer, "stack": stack.name}
        for name, module in block.named_modules():
            known = name.rpartition(".")[2]
            part = "cross" if "cross" in name or "enc" in known.lower() else None
            path = self.where.get(id(unwrap(module)), "")
            if isinstance(module, nn.MultiheadAttention):
                self.multihead(module, path, layer, part, stack.name)
            elif asks_for_attention(module):
                self._attention(module, path, part, rest)
                last = next((m for n in table.PROJECTION if (m := module_at(module, n)) is not None), None)
                self._head(module, last, path, part, flow, rest)
        for name in table.FEED_FORWARD:
            home = module_at(block, name)
            if home is not None:
                last = next((m for n in table.LAST if (m := module_at(home, n)) is not None), None)
                if last is None and isinstance(home, nn.Sequential):
                    linear = [m for m in home if isinstance(m, nn.Linear)]
                    last = linear[-1] if len(linear) > 1 else None
                self._activation(home, last, join(here, name), flow, rest)
                return
        self.found.undecided.append((here, "no child is named like a feed-forward: no site of activation"))

    def _output(self, stack: Stack, flow: str) -> None:
        form = stack.form
        names = table.FINAL_NORM if form is None else form.norms
        norm = next((m for name in names if (m := module_at(stack.owner, name)) is not None), None)
        if norm is None and form is not None and form.last_norm and not form.shared:
            norm = module_at(stack.blocks[-1], form.last_norm)
        if norm is not None:
            self.found.add("output", self.where[id(norm)], norm, "output", layout=flow, stack=stack.name)
        elif form is None or not form.shared:
            self.found.undecided.append((stack.path, "no final norm was found: no site of output"))


def _unknown_dropout(stack: Stack, block: nn.Module) -> str | None:
    """Return the name of an nn.Dropout of a block of which its row does not say what it drops."""
    if stack.form is None:
        return None
    known = {path.partition(".")[0] for path in (*stack.form.own, *stack.form.may)}
    strange = (n for n, child in block.named_children() if isinstance(child, nn.Dropout) and n not in known)
    return next(strange, None)


def heads(module: nn.Module) -> int | None:
    """Return the number of query heads that an attention module, or its config, names."""
    for holder in (module, getattr(module, "config", None)):
        for name in table.HEADS:
            number = getattr(holder, name, None)
            if isinstance(number, int) and not isinstance(number, bool):
                return number
    return None


def has_fast_path(root: nn.Module) -> bool:
    """Whether an eval fast path in `root` would be switched off by the mere presence of hooks."""
    return any(isinstance(m, nn.TransformerEncoder | nn.TransformerEncoderLayer) for m in root.modules())


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The tensor whose first axis counts the rows of a forward: the first argument that is one."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value
    return None
