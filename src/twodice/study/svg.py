"""A matplotlib figure as inline SVG: the same bytes each time, colours from CSS variables, text as text.

Knows nothing of studies. A picture is drawn with *sentinel* colours, one for each role ("ink", "grid",
"arm-1"); what matplotlib writes is then rewritten so that every sentinel becomes ``var(--role)`` and every
``style`` attribute becomes presentation attributes. So one picture serves light, dark and print, and a page
whose content policy forbids inline styles can show it. A fixed `Theme` (for PNG) has true colours instead.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SVG = "http://www.w3.org/2000/svg"
XLINK = "{http://www.w3.org/1999/xlink}href"
FONT = "DejaVu Sans"  # ships inside matplotlib: the layout is the same on every machine

SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "twodice",
    "svg.id": None,
    "font.family": [FONT],
    "font.size": 12.0,
    "text.usetex": False,
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "axes.formatter.useoffset": False,
    "path.simplify": False,
    "path.sketch": None,
    "figure.dpi": 72.0,
    "savefig.dpi": 72.0,
    "savefig.bbox": None,
    "savefig.transparent": False,
}

# Okabe and Ito's colours, which stay apart under all common forms of colour blindness, darkened for text on
# white (light) and lightened for text on near-black (dark). "arm-0" is the baseline: neutral, since all else
# is held against it.
LIGHT: dict[str, str] = {
    "surface": "#ffffff",
    "ink": "#1b1f27",
    "soft": "#566070",
    "rule": "#aab2bf",
    "grid": "#e7eaef",
    "arm-0": "#5a6372",
    "arm-1": "#0067a8",
    "arm-2": "#b8560b",
    "arm-3": "#007a5c",
    "arm-4": "#a33f78",
    "arm-5": "#7a6a00",
    "arm-6": "#5b4fc0",
    "arm-7": "#9c3a2e",
    "die-1": "#0067a8",
    "die-2": "#b8560b",
    "good": "#00705a",
    "bad": "#b3261e",
}
DARK: dict[str, str] = {
    "surface": "#171a21",
    "ink": "#eceff4",
    "soft": "#a3adbd",
    "rule": "#596273",
    "grid": "#2a2f3a",
    "arm-0": "#aeb7c5",
    "arm-1": "#5bb5f0",
    "arm-2": "#f2a154",
    "arm-3": "#45c9a1",
    "arm-4": "#e38fbf",
    "arm-5": "#d9c84a",
    "arm-6": "#aaa2f7",
    "arm-7": "#f08a7c",
    "die-1": "#5bb5f0",
    "die-2": "#f2a154",
    "good": "#45c9a1",
    "bad": "#ff8f85",
}
NUM_ARM_COLOURS = 8

#: Each role's own colour in a drawing that is to be themed later; none of them can be meant literally.
SENTINELS: dict[str, str] = {role: f"#fe{index:02x}ef" for index, role in enumerate(LIGHT)}


class Theme(NamedTuple):
    """Where a picture's colours come from: `colours` by role; `name` says which theme this is."""

    name: str
    colours: Mapping[str, str]

    def of(self, role: str) -> str:
        """The colour of `role`."""
        return self.colours[role]


CSS_THEME = Theme("css", SENTINELS)
LIGHT_THEME = Theme("light", LIGHT)
DARK_THEME = Theme("dark", DARK)


def css_variables(colours: Mapping[str, str]) -> str:
    """``--role: #colour;`` for each role, in the order of the palette."""
    return " ".join(f"--{role}: {colour};" for role, colour in colours.items())


def svg_of(
    figure: Figure, *, name: str, title: str, description: str, data: Mapping[str, Mapping[str, Any]]
) -> str:
    """Inline SVG of `figure`.

    Parameters
    ----------
    figure
        Drawn with `CSS_THEME`.
    name
        Prefix of every id in the picture, so that many pictures can stand in one page.
    title, description
        For those who hear the page instead of seeing it.
    data
        What was plotted, by the ``gid`` of the artist: each value becomes a ``data-`` attribute of that
        group, and the key ``tip`` a tooltip.

    Raises
    ------
    ValueError
        If a gid in `data` was not drawn: then a number would be claimed to be in the picture and is not.
    """
    import matplotlib

    stream = io.BytesIO()
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        # The browser has letters that the layout font lacks (an arm may be named in Chinese); only widths are
        # guessed.
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        figure.savefig(
            stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    root = ElementTree.fromstring(stream.getvalue().decode("utf-8"))
    _drop_style_elements(root)
    drawn = {element.get("id"): element for element in root.iter() if element.get("id")}
    missing = sorted(set(data) - set(drawn))
    if missing:
        raise ValueError(f"every plotted value must be in the picture {name!r}; not drawn: {missing[:5]}")
    for gid, values in data.items():
        _attach_data(drawn[gid], values)
    for element in root.iter():
        _rewrite(element, name)
    _name_for_listeners(root, name, title, description)
    return _text_of(root)


def png_of(figure: Figure, *, dpi: int = 144) -> bytes:
    """PNG of a `figure` that was drawn with a fixed theme; the same bytes each time on one machine."""
    import matplotlib

    stream = io.BytesIO()
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        figure.savefig(stream, format="png", dpi=dpi, metadata={"Software": None})
    return stream.getvalue()


def number_text(value: float | int | None) -> str:
    """The one way in which a number stands in a ``data-`` attribute: `repr`, so that it can be compared
    exactly."""
    return "" if value is None else repr(value)


def printable(text: str) -> str:
    """`text` with what may not stand in XML (control characters) shown as a replacement mark."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def _attach_data(element: ElementTree.Element, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if key == "tip":
            tip = ElementTree.Element(f"{{{SVG}}}title")
            tip.text = printable(str(value))
            element.insert(0, tip)
        elif isinstance(value, str):
            element.set(f"data-{key}", printable(value))
        elif isinstance(value, list | tuple):
            element.set(f"data-{key}", " ".join(number_text(v) for v in value))
        else:
            element.set(f"data-{key}", number_text(value))


def _drop_style_elements(root: ElementTree.Element) -> None:
    # matplotlib's own <style> has the selector `*`: inline, it would restyle the whole page.
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == f"{{{SVG}}}style":
                parent.remove(child)


_COLOUR_TO_VARIABLE = {colour: f"var(--{role})" for role, colour in SENTINELS.items()}
_NO_ROTATION = re.compile(r"rotate\(-?0 [^)]*\)")
_KEPT_AS_ATTRIBUTE = frozenset(
    "fill fill-opacity fill-rule stroke stroke-width stroke-opacity stroke-dasharray stroke-dashoffset "
    "stroke-linecap stroke-linejoin font-size font-weight font-style text-anchor opacity".split()
)


def _rewrite(element: ElementTree.Element, name: str) -> None:
    style = element.attrib.pop("style", None)
    if style is not None:
        for declaration in style.split(";"):
            key, _, value = (part.strip() for part in declaration.partition(":"))
            if key in _KEPT_AS_ATTRIBUTE:
                element.set(key, _COLOUR_TO_VARIABLE.get(value, value))
    if XLINK in element.attrib:
        element.set("href", f"#{name}-{element.attrib.pop(XLINK)[1:]}")
    if "id" in element.attrib:
        element.set("id", f"{name}-{element.attrib['id']}")
    if element.get("clip-path"):
        element.set("clip-path", element.attrib["clip-path"].replace("url(#", f"url(#{name}-"))
    if "transform" in element.attrib and _NO_ROTATION.fullmatch(element.attrib["transform"]):
        del element.attrib["transform"]
    if "d" in element.attrib:
        element.set("d", " ".join(element.attrib["d"].split()))


def _name_for_listeners(root: ElementTree.Element, name: str, title: str, description: str) -> None:
    for key in ("width", "height"):  # the page decides the size; the viewBox keeps the shape
        root.attrib.pop(key, None)
    root.set("class", "chart")
    root.set("id", name)
    root.set("role", "img")
    root.set("stroke-linejoin", "round")
    root.set("aria-labelledby", f"{name}-title {name}-desc")
    for index, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(f"{{{SVG}}}{tag}", {"id": f"{name}-{tag}"})
        element.text = printable(text)
        root.insert(index, element)


def _text_of(root: ElementTree.Element) -> str:
    ElementTree.register_namespace("", SVG)
    for element in root.iter():
        if element.text is not None and not element.text.strip():
            element.text = None
        element.tail = "\n" if element.tail is not None else None
    return ElementTree.tostring(root, encoding="unicode").strip() + "\n"
