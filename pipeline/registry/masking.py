"""Secrets stay out of what is published."""

import re
from typing import Any

MASK = "***"
_SECRET = re.compile(
    r"(?i)password|passwd|passphrase|secret|token|credential|signature|(api|access|auth|private|ssh)[._-]?key|(^|[._-])key$"
)
_LOGIN = re.compile(r"(?<=://)[^/@\s]*@")  # user:password@ of a URI
_QUERY = re.compile(r"([?&;])([^=&;\s]+)=([^&;\s]+)")


def mask(value: Any, key: str = "") -> Any:
    """``value`` with every secret replaced: values of keys that name one, logins and secret parameters in URIs."""
    if isinstance(value, dict):
        return {k: mask(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [mask(item, key) for item in value]
    if value is not None and not isinstance(value, bool) and _SECRET.search(key):
        return MASK
    return mask_text(value) if isinstance(value, str) else value


def mask_text(text: str) -> str:
    """Logins and secret parameters of the URIs in ``text`` replaced."""
    text = _LOGIN.sub(f"{MASK}@", text)
    return _QUERY.sub(lambda m: f"{m[1]}{m[2]}={MASK}" if _SECRET.search(m[2]) else m[0], text)


def mask_argument(text: str) -> str:
    """A ``key=value`` of a command line with what is secret in it replaced."""
    key, sign, value = text.partition("=")
    return f"{key}{sign}{mask(value, key) if value else value}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without secrets, shortened."""
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    text = mask_text(text)
    return text if len(text) <= 200 else f"{text[:197]}..."
