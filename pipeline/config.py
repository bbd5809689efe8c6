"""Configuration: composed by Hydra from ``pipeline/conf``, refused in one line when it is wrong."""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import PipelineError, Unavailable
from pipeline.files import in_uri
from pipeline.renamed import RENAMED, current, current_key, current_override

CONF = Path(__file__).parent / "conf"
Config = dict[str, Any]
GIVEN = "given"  # of a training or a campaign that is resumed: the keys that were named
KEPT_APART = ("name", "storage", "cluster", "tracking", "register_as")  # may be given beside config=FILE
M = TypeVar("M", bound=BaseModel)
# Keys whose value is one path or name, taken as it was typed: "2024_11_28" is no number, "/tmp/a,b" no choice of two.
PATHS = frozenset(
    ("data.root", "data.source.path", "data.source.cache", "data.source.splits", "storage", "initial", "support")
    + ("backbone.weights", "backbone.path", "method.teacher", "dataset", "folder", "profile", "published")
    + ("queries", "enrolment", "save_enrolment", "output", "record", "runs", "tracking.artifacts")
)
NAMES = frozenset(
    ("name", "data.name", "run", "resume", "register_as", "alias", "challenger", "compare", "model")
    + ("backbone.model", "backbone.trained_on", "retrain.force")
    + ("tracking.uri", "tracking.experiment")
)
WHOLE = frozenset(("data.source.fractions",))  # dicts whose own keys are the user's
# What is a path in some jobs, and a number in others.
PATHS_OF_JOBS = {job: frozenset(("images",)) for job in ("export", "benchmark")}
OmegaConf.register_new_resolver("in_uri", in_uri, replace=True)  # of conf/tracking
_PLAIN = re.compile(r"[A-Za-z_][\w./+-]*", re.ASCII)  # text that needs no quotes


class Section(BaseModel):
    """A part of a configuration: unknown keys are refused, values are not guessed into other types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def compose(job: str, overrides: list[str] | None = None) -> Config:
    """The configuration of ``job`` with ``key=value`` overrides, as plain containers."""
    single = [part for override in overrides or [] for part in _single(current_override(override))]
    typed = [_as_typed(job, override) for override in single]
    overrides = [part for override in typed for part in _whole(override)]
    if any(override.startswith("config=") for override in overrides):
        return _stored(job, overrides)
    for override in overrides:
        if "=" not in override and not override.startswith("~"):
            raise PipelineError(f"{override!r} is not key=value; see: python -m jobs.{job} --help")
        key = override.lstrip("+~").partition("=")[0]
        if job in ("train", "embed", "demo") and key.startswith("data.source"):
            raise PipelineError(
                f"{key}: jobs.{job} takes the dataset as it was ingested; this key is for jobs.ingest and jobs.retrain"
            )
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
            composed = hydra_compose(config_name=job, overrides=overrides)
            config = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OverrideParseException as error:
        shown = " ".join(str(error.override).split())
        raise PipelineError(f"{shown}: the value cannot be read; quote it, or see: --help") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise PipelineError(_one_line(str(error), job, overrides)) from error
    except (ValueError, TypeError, AttributeError, AssertionError, RecursionError) as error:  # Hydra's, of odd values
        raise PipelineError(f"{' '.join(overrides)}: cannot be read ({' '.join(str(error).split())})") from error
    assert isinstance(config, dict)
    named = {str(key): value for key, value in config.items()}
    if job in ("train", "tune") and named.get("resume"):  # what was asked for counts even where it is the default
        named[GIVEN] = [override.lstrip("+~").partition("=")[0] for override in overrides]
    return named


def gather(arguments: Sequence[str], lists: Mapping[str, str]) -> list[str]:
    """``PREFIX.KEY=VALUE`` put into the list ``lists[PREFIX]=["KEY=VALUE", ...]``, quoted as Hydra reads it."""
    kept: list[str] = []
    found: dict[str, list[str]] = {prefix: [] for prefix in lists}
    for argument in arguments:
        prefix, _, rest = argument.partition(".")
        if rest and prefix in lists:
            found[prefix].append(rest)
        else:
            kept.append(argument)
    for prefix, values in found.items():
        key = lists[prefix]
        if values and any(argument.startswith(f"{key}=") for argument in kept):
            raise PipelineError(f"give {prefix}.KEY=VALUE or {key}=[...], not both")
        if values:
            kept.append(f"{key}=[{','.join(map(_quoted, values))}]")
    return kept


def literal(value: Any) -> str:
    """A value as Hydra's grammar writes it on the right of ``key=``.

    Raises:
        PipelineError: it is of a type that no configuration holds.
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str | Path):
        text = str(value)
        plain = _PLAIN.fullmatch(text) and text.lower() not in ("null", "true", "false", "nan", "inf")
        return text if plain else _quoted(text)
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{literal(part)}" for key, part in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(map(literal, value)) + "]"
    raise PipelineError(f"{value!r:.40} is of type {type(value).__name__}: give a number, text, list or dict")


def as_argument(key: str, value: Any) -> str:
    """``key=value`` that :func:`compose` reads as this value."""
    return f"{key}={value}" if isinstance(value, str) and key in PATHS | NAMES else f"{key}={literal(value)}"


def _as_typed(job: str, override: str) -> str:
    """An override of a path or a name in quotes, "~" expanded; null, quotes, lists and "${...}" are Hydra's to read."""
    key, equals, value = override.partition("=")
    path = key.lstrip("+") in PATHS | PATHS_OF_JOBS.get(job, frozenset())
    if not equals or not (path or key.lstrip("+") in NAMES):
        return override
    if not value:  # which as a path is the working folder
        raise PipelineError(f"{key}= is empty, as of a variable of the shell that is not set: give a value, or null")
    path = path or value.startswith("~/")  # of what is a name or a folder
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        inside = value[1:-1]
        return f"{key}={value[0]}{os.path.expanduser(inside) if path else inside}{value[0]}"
    if key == "retrain.force" and value.lower() in ("true", "false"):
        return override
    if value in ("null", "???") or "${" in value or (value.startswith("[") and value.endswith("]")):
        return override
    return f"{key}={_quoted(os.path.expanduser(value) if path else value)}"


def _single(override: str) -> list[str]:
    """``data.source={KEY: VALUE, ...}`` as one override a key, each of which is read as it is by itself."""
    key, _, value = override.partition("=")
    if key.lstrip("+") not in {whole.rpartition(".")[0] for whole in WHOLE} or not value.startswith("{"):
        return [override]
    try:
        parts = OverridesParser.create().parse_override(override).value()
    except HydraException:  # which Hydra says when it composes
        return [override]
    assert isinstance(parts, dict)
    return [f"{key}.{name}={literal(part)}" for name, part in parts.items()]


def _whole(override: str) -> list[str]:
    """A dict of ``WHOLE`` in place of the one that is there, with which Hydra would merge it."""
    key, _, value = override.lstrip("+").partition("=")
    return [f"~{key}", f"+{key}={value}"] if key in WHOLE and value.startswith("{") else [override]


def _quoted(text: str) -> str:
    """In double quotes, where a backslash means something before a quote alone."""
    return '"' + re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + found[2].replace('"', '\\"'), text) + '"'


def unquoted(text: str) -> str:
    """What :func:`literal` or a user put in quotes; other text as it is. For what is read before Hydra sees it."""
    if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"":
        return text
    return re.sub(rf"(\\+)({text[0]}|$)", lambda found: found[1][: len(found[1]) // 2] + found[2], text[1:-1])


def _stored(job: str, overrides: list[str]) -> Config:
    """The whole configuration in the YAML file of ``config=FILE`` as it is, but where the run runs and is kept."""
    from pipeline import store  # here, since it loads pyarrow, and --help does without

    named = [unquoted(override.removeprefix("config=")) for override in overrides if override.startswith("config=")]
    paths = [os.path.expanduser(path) for path in named]
    rest = [override for override in overrides if not override.startswith("config=")]
    try:
        text = store.read_bytes(paths[-1]).decode("utf-8")
        config = yaml.safe_load(text)
    except (PipelineError, OSError, UnicodeError, yaml.YAMLError) as error:
        kind = Unavailable if isinstance(error, Unavailable) else PipelineError
        raise kind(f"config={paths[-1]} cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(config, dict):
        raise PipelineError(f"config={paths[-1]}: this file holds no configuration")
    config = {str(key): value for key, value in config.items()}
    for key in RENAMED.keys() & flat(config).keys():
        current_key(key)  # says so
    config = current(config)
    given = compose(job, rest)
    for override in rest:
        key = override.lstrip("+~").partition("=")[0]
        part, _, name = key.partition(".")
        if part not in KEPT_APART:
            raise PipelineError(f"{key}: config=FILE is taken as it is; change it in the file")
        if name and isinstance(config.get(part), dict):
            config[part][name] = given[part][name]
        else:
            config[part] = given[part]
    return config


def given_keys(job: str, raw: Config) -> list[str]:
    """Keys of a job that were named, or whose values are not the defaults."""
    default, named = flat(compose(job)), raw.get(GIVEN, [])

    def given(key: str, value: Any) -> bool:
        return key not in default or default[key] != value or key in named or key.partition(".")[0] in named

    return [key for key, value in flat({k: v for k, v in raw.items() if k != GIVEN}).items() if given(key, value)]


def usual_choice(group: str, choice: str) -> Config:
    """A file of a group as it stands, without Hydra: for messages, whenever they are due."""
    found = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{choice}.yaml"), resolve=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def validate(schema: type[M], config: Config) -> M:
    """``config`` as a checked object; the first wrong key is named with its limit."""
    try:
        return schema.model_validate(current(config))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise PipelineError(f"unknown key {key!r}{_suggest(key, _schema_keys(schema))}") from error
        if first["type"] == "missing":
            raise PipelineError(f"key {key!r} is missing") from error
        message = str(first["msg"]).removeprefix("Value error, ")
        where = f"{key}={first['input']!r}: " if key else ""
        raise PipelineError(f"{where}{message[0].lower()}{message[1:]}") from error


def config_hash(config: Config) -> str:
    """SHA-256 of a configuration, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(config, sort_keys=False)


def help_text(job: str, overrides: Sequence[str] = ()) -> str:
    """Every key of a job with its comment, and the choices of every group; ``overrides`` choose whose are shown."""
    choices = dict(override.split("=", 1) for override in _choices(overrides))
    text = (CONF / f"{job}.yaml").read_text()
    lines = [f"python -m jobs.{job} [key=value ...] [--json] [--help]", "", text.strip(), ""]
    for group in re.findall(r"^\s*-\s+(?:override\s+|optional\s+)?/?(\w+):", text, flags=re.MULTILINE):
        folder = CONF / group
        if not folder.is_dir():
            continue
        options = sorted(path.stem for path in folder.glob("*.yaml"))
        lines += [f"--- {group}: one of {', '.join(options)} ---"]
        default = re.search(rf"^\s*-\s+/?{group}:\s*(\w+)", text, flags=re.MULTILINE)
        chosen = choices.get(group, default[1] if default else "")
        if chosen in options:
            lines += [f"# {group}={chosen}", (folder / f"{chosen}.yaml").read_text().strip()]
        lines += [""]
    return "\n".join(lines)


def flat(config: Config, prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            out.update(flat(value, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = value
    return out


def _choices(overrides: Sequence[str]) -> list[str]:
    """The overrides that choose a file of a group: data=folder."""
    plain = [override for override in overrides if re.fullmatch(r"\w+=\w+", override)]
    return [override for override in plain if (CONF / override.partition("=")[0]).is_dir()]


def chosen_files(job: str, overrides: Sequence[str]) -> dict[str, str]:
    """The file of each group, by ``overrides``, their recipe, or default: not always the name that stands in it."""
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        composed = hydra_compose(config_name=job, overrides=_choices(overrides), return_hydra_config=True)
    return {str(group): str(file) for group, file in composed.hydra.runtime.choices.items()}


def _one_line(message: str, job: str, overrides: Sequence[str]) -> str:
    unknown = re.search(r"Could not (?:override|delete from config\.) '([^']+)'", message)
    if unknown:
        known = _known_keys(job, _choices(overrides))
        see = " ".join([f"python -m jobs.{job}", *_choices(overrides), "--help"])
        if unknown[1] in known:
            return f"{unknown[1]} is a group of keys: add to it with +{unknown[1]}=..., or set one of them; see: {see}"
        return f"unknown key {unknown[1]!r}{_suggest(unknown[1], known)}; see: {see}"
    group = re.search(r"(?:Could not find|In '[^']+': Could not find) '([^']+)'", message)
    if group:
        folder, _, choice = group[1].rpartition("/")
        options = sorted(path.stem for path in (CONF / folder).glob("*.yaml"))
        return f"{folder}={choice}: there is no such {folder}; choose one of {', '.join(options)}"
    if "Missing mandatory value" in message:
        key = message.rsplit("full_key:", 1)[-1].split()[0] if "full_key:" in message else message
        return f"{key} must be given: {key}=VALUE; see: python -m jobs.{job} --help"
    return " ".join(message.split())


def _known_keys(job: str, choices: list[str]) -> list[str]:
    try:
        with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
            composed = OmegaConf.to_container(hydra_compose(config_name=job, overrides=choices), resolve=False)
    except (HydraException, OmegaConfBaseException):
        return []
    assert isinstance(composed, dict)
    leaves = list(flat({str(k): v for k, v in composed.items()}))
    return list(dict.fromkeys(".".join(leaf.split(".")[:depth]) for leaf in leaves for depth in range(1, 9)))


def _schema_keys(schema: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, info in schema.model_fields.items():
        keys.append(prefix + name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            keys += _schema_keys(info.annotation, f"{prefix}{name}.")
    return keys


def _suggest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1) or [k for k in known if k.rsplit(".", 1)[-1] == key][:1]
    return f"; did you mean {close[0]!r}?" if close else ""
