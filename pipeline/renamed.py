"""Configuration keys that were renamed or came later. An old name is understood for one release, with a line that says
so; a key that came later changes no hash of a configuration that does not use it.
"""

import re
import sys
from collections.abc import Mapping
from typing import Any

RENAMED = {  # old: new, with the section that both are in
    "train.tasks": "train.meta_batch_size",
    "max_skipped_share": "max_skipped_fraction",
    "retrain.max_skipped_share": "retrain.max_skipped_fraction",
}
LATER = {  # with the value that is as without the key
    "augmentation.affine": 0.0,
    "optimizer.backbone_lr": None,
    "backbone.batch_norm": "batch",
}
_FORMER = {new: old for old, new in RENAMED.items()}
_said: set[str] = set()


def current_key(key: str) -> str:
    """Today's name of a dotted key."""
    if key not in RENAMED:
        return key
    if key not in _said:  # once a process
        _said.add(key)
        print(f"note: {key} is called {RENAMED[key]} now; the old name goes with the next release", file=sys.stderr)
    return RENAMED[key]


def current_override(text: str) -> str:
    """``key=value`` of a command line, with today's name of the key; ``base.KEY`` too."""
    found = re.match(r"([+~]*)(base\.|fix\.)?([^=]*)(.*)", text, re.DOTALL)
    assert found is not None
    signs, prefix, key, rest = found.groups()
    return f"{signs}{prefix or ''}{current_key(key)}{rest}"


def current(config: Mapping[str, Any]) -> dict[str, Any]:
    """A stored configuration with today's names of its keys."""
    return _renamed(config, RENAMED)


def former(config: Mapping[str, Any]) -> dict[str, Any]:
    """With the names that keys had at first."""
    return _renamed(config, _FORMER)


def at_first(config: Mapping[str, Any]) -> dict[str, Any]:
    """As it was written at first: what a hash of a configuration is of, which a new name or key does not change."""
    out = former(config)
    for key, unused in LATER.items():
        section, _, name = key.rpartition(".")
        part = out.get(section)
        if isinstance(part, Mapping) and name in part and part[name] == unused:
            out[section] = {k: value for k, value in part.items() if k != name}
    return out


def _renamed(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    out = dict(config)
    for key, name in names.items():
        section, _, old = key.rpartition(".")
        new = name.rpartition(".")[2]
        part = out.get(section) if section else out
        if not isinstance(part, Mapping) or old not in part or new in part:
            continue
        changed = {new if k == old else k: value for k, value in part.items()}
        if section:
            out[section] = changed
        else:
            out = changed
    return out
