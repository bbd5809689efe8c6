"""A chart as a part of a page: its colours become those of the style sheet, which suit light and dark, and its marks
say what they are where the pointer rests on them."""

import hashlib
import re
import xml.etree.ElementTree as ET

from markupsafe import Markup

from pipeline.charts.style import BACK, FAINT, GRID, HEAT, INK, PALETTE, PAPER, STATUS, TIP, clean

SVG, LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
PIXELS = 4 / 3  # of a point
COLOURS = {
    INK: "var(--ink)", FAINT: "var(--soft)", GRID: "var(--line)", BACK: "var(--back)", PAPER: "var(--paper)",
    STATUS["finished"]: "var(--good)", STATUS["stopped"]: "var(--warn)", STATUS["failed"]: "var(--bad)",
    **{colour: f"var(--c{number})" for number, colour in enumerate(PALETTE)},
    **{colour: f"color-mix(in oklab, var(--v10) {10 * level}%, var(--v0))" for level, colour in enumerate(HEAT)},
}  # fmt: skip
_COLOUR = re.compile("|".join(COLOURS))
_FONT = re.compile(r"(?:(bold|\d00) )?([\d.]+)px")


def inline(drawn: bytes, title: str) -> Markup:
    """Of an SVG file by :mod:`pipeline.charts`; ``title`` is for those who do not see it."""
    root = ET.fromstring(drawn)
    salt = hashlib.sha256(drawn).hexdigest()[:8]  # several charts are parts of one page
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == f"{SVG}style" or not child.tag.startswith(SVG) or child.tag == f"{SVG}metadata":
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        _set_style(element)
        name = element.attrib.pop("id", "")
        if element.tag == "g":
            if name.startswith(TIP):
                note = ET.Element("title")
                note.text = name.removeprefix(TIP)
                element.insert(0, note)
        elif name:
            element.set("id", f"{salt}-{name}")
        if LINK in element.attrib:
            element.set("href", f"#{salt}-{element.attrib.pop(LINK)[1:]}")
        if "clip-path" in element.attrib:
            element.set("clip-path", element.attrib["clip-path"].replace("url(#", f"url(#{salt}-"))
    _, _, width, height = (float(part) * PIXELS for part in root.attrib["viewBox"].split())
    root.attrib = {
        "viewBox": root.attrib["viewBox"], "width": f"{width:.0f}", "height": f"{height:.0f}", "role": "img",
        "aria-label": clean(title), "stroke-linejoin": "round",
    }  # fmt: skip
    return Markup(ET.tostring(root, encoding="unicode"))


def _set_style(element: ET.Element) -> None:
    """Attributes in place of a style, which the page's policy does not allow."""
    for declaration in filter(None, element.attrib.pop("style", "").split(";")):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name == "font":
            found = _FONT.match(value)
            if found is not None:
                element.set("font-size", found[2])
                if found[1]:
                    element.set("font-weight", found[1])
        elif name != "font-family":
            element.set(name, _COLOUR.sub(lambda match: COLOURS[match[0]], value))
    for name in ("fill", "stroke"):
        if name in element.attrib and not element.attrib[name].startswith(("var", "color-mix")):
            element.set(name, _COLOUR.sub(lambda match: COLOURS[match[0]], element.attrib[name]))
