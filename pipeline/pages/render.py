"""Pages from templates: everything is escaped, nothing is fetched, and only this package's style and script run."""

import base64
import hashlib
import re
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

_environment = Environment(
    loader=PackageLoader("pipeline.pages", "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def _part(name: str) -> str:
    return files("pipeline.pages").joinpath("templates", name).read_text("utf-8")


def _hash(text: str) -> str:
    """As a Content-Security-Policy names what may run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def render(template: str, **context: Any) -> bytes:
    style, script = _part("pages.css"), _part("pages.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    context |= {"style": Markup(style), "script": Markup(script), "policy": policy}
    return _environment.get_template(template).render(context).encode("utf-8", "replace")


def file_name(kind: str, name: str) -> str:
    """``model-NAME.html``: of any name a plain one, and of different names different ones."""
    plain = re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")[:60]
    if plain != name or not plain or re.search(r"-[0-9a-f]{8}$", plain):
        plain = f"{plain or 'name'}-{hashlib.sha256(name.encode('utf-8', 'replace')).hexdigest()[:8]}"
    return f"{kind}-{plain}.html"


def when(milliseconds: int | float | None) -> str:
    if not milliseconds:
        return ""
    try:
        return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError, OSError):
        return ""
