"""Recipe (YAML) -> typed RunConfig: unknown keys and wrong types are refused by their full name."""

import dataclasses
import difflib
import json
import re
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from glipv2.model.config import ModelConfig, preset
from glipv2.pipeline import storage
from glipv2.pipeline.answers import read_answers
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.errors import ConfigError
from glipv2.pipeline.rounds import rounds_of, with_rounds
from glipv2.pipeline.strict_yaml import parse_yaml

MOST_EXTENDED = 5
"""How many recipes may extend one another."""
MOST_NAMED = 3
"""Recipes of a folder that was given instead of one."""
WHOLE_RUN = ("run_dir=", "phases=", "phases.", "rounds=", "all_rounds=")
"""Overrides of the whole run, which are none of a phase."""


class OverrideError(ConfigError):
    """A mistake of the command line; the message begins with the override."""


class _Given(dict[str, Any]):
    """A mapping of the command line."""


def load_config(recipe: str, overrides: list[str], phase: str | None = None) -> RunConfig:
    """Read a recipe; with `phase`, apply that phase's overrides and give it its own run folder.

    A recipe may start from another one: `extends: other.yaml`, beside it. Recipes and phases merge
    with what they change; so does `train={...}` of `overrides`, the settings of a section, but the
    mapping of a field whose keys are free, as `label.inputs={...}`, replaces the one before.
    Raises ConfigError (file or override, full key, cure) for what is not a valid configuration.
    """
    tree = read_recipe(recipe)
    tree.setdefault("run_dir", f"runs/{Path(recipe).stem}")
    try:
        return config_from_tree(tree, overrides, phase)
    except OverrideError:
        raise
    except ConfigError as error:
        raise ConfigError(f"{recipe}: {error}") from error


def read_recipe(recipe: str, depth: int = 0) -> dict[str, Any]:
    """The YAML of a recipe together with those that it extends."""
    if not storage.exists(recipe):
        raise ConfigError(f"recipe {recipe} does not exist; recipes are in infra/recipes/")
    if storage.is_local(recipe) and Path(storage.local_path(recipe)).is_dir():
        raise ConfigError(f"{recipe} is a folder; a recipe is a YAML file, {_recipes_in(recipe)}")
    tree = parse_yaml(storage.read_bytes(recipe), f"recipe {recipe}")
    if not isinstance(tree, dict):
        raise ConfigError(f"recipe {recipe} must be a mapping of sections")
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if depth == MOST_EXTENDED:
        raise ConfigError(f"recipe {recipe}: `extends` goes round in a circle")
    folder = recipe.rpartition("/")[0] or "."
    merged: dict[str, Any] = _merge(read_recipe(f"{folder}/{base}", depth + 1), tree)
    return merged


def _recipes_in(folder: str) -> str:
    names = [name for name in storage.list_names(folder) if name.endswith((".yaml", ".yml"))]
    if not names:
        return "and none is in it; there are some in infra/recipes/"
    some = [storage.join(folder, name) for name in names[:MOST_NAMED]]
    return "perhaps " + " or ".join(some + ["another there"] * (len(names) > MOST_NAMED))


def config_from_tree(
    tree: dict[str, Any], overrides: list[str], phase: str | None = None
) -> RunConfig:
    config = _apply_overrides(_build(RunConfig, tree, None, ""), overrides)
    try:
        config = with_rounds(config)
        for name in config.phases:
            _apply_phase(config, name)  # a mistake in any phase is reported before work starts
    except ConfigError as error:
        for override in overrides:
            key = re.escape(override.partition("=")[0])
            if re.match(rf"(unknown config key )?{key}\b", str(error)):
                raise OverrideError(f"{override}: {error}") from error
        raise
    if phase is None:
        return config
    # again, because overrides win over the phase; those of the whole run have done their work
    own = [text for text in overrides if not text.startswith(WHOLE_RUN)]
    phased = _apply_overrides(_apply_phase(config, phase), own)
    if phase in rounds_of(config)[1:]:  # overrides of these say what the first round's are
        label = config.phases[phase]["label"]
        apart = {key: label[key] for key in ("teacher", "inputs")}
        phased = dataclasses.replace(phased, label=dataclasses.replace(phased.label, **apart))
    init, teacher = phased.train.init, phased.label.teacher  # names of the whole run's phases
    return dataclasses.replace(
        phased,
        train=dataclasses.replace(phased.train, init=init and config.run_url(init)),
        label=dataclasses.replace(phased.label, teacher=teacher and config.run_url(teacher)),
    )


def _apply_overrides(config: RunConfig, overrides: list[str]) -> RunConfig:
    for override in overrides:
        tree = override_tree(override)
        try:
            config = _build(RunConfig, tree, config, "")
        except ConfigError as error:
            raise OverrideError(f"{override}: {error}") from error
    return config


def _apply_phase(config: RunConfig, phase: str) -> RunConfig:
    if phase not in config.phases:
        known = ", ".join(config.phases) or "none"
        raise ConfigError(f"phase {phase!r} is not in the recipe; its phases are: {known}")
    applied: RunConfig = _build(RunConfig, config.phases[phase], config, f"phases.{phase}.")
    return dataclasses.replace(
        applied,
        run_dir=config.run_url(phase),
        data=dataclasses.replace(applied.data, root=config.data_root),
        phases={},
        rounds=1,
        all_rounds=False,
    )


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML, every default spelled out."""
    return yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True)


def as_tree(value: Any) -> Any:
    """Dataclasses as plain dicts and lists, ready for JSON or YAML."""
    return _plain(value)


def from_tree(cls: type, tree: dict[str, Any], path: str = "") -> Any:
    """The inverse of `as_tree` for one configuration class, as strict as a recipe."""
    return _build(cls, tree, None, path)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def override_tree(override: str) -> dict[str, Any]:
    """What `section.key=value` says, in a recipe's form."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise OverrideError(f"override {override!r} must look like section.key=value")
    try:
        value = _as_given(parse_yaml(text, "the value")) if text else ""
    except ConfigError as error:
        raise OverrideError(f"{override}: {error}") from error
    *sections, last = key.split(".")
    tree: dict[str, Any] = {last: value}
    for part in reversed(sections):
        tree = {part: tree}
    return tree


def _as_given(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return _Given({key: _as_given(item) for key, item in value.items()})


def _build(cls: type, tree: Any, base: Any, path: str) -> Any:
    """An instance of dataclass `cls` from a mapping; fields it does not name come from `base`."""
    if not isinstance(tree, dict):
        where = path.rstrip(".") or "the recipe"
        raise ConfigError(f"{where} must be a mapping, not {_shown(tree)}")
    hints = get_type_hints(cls)
    for key in tree:
        if key not in hints:
            raise ConfigError(_unknown_key(path, str(key), cls))
    if cls is ModelConfig:
        base, tree = _model_parts(base, tree, path)
    values = {}
    for field in dataclasses.fields(cls):
        old = getattr(base, field.name) if base is not None else None
        if field.name in tree:
            new = _convert(hints[field.name], tree[field.name], old, f"{path}{field.name}")
            values[field.name] = new
        elif base is not None:
            values[field.name] = old
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{path}{field.name} is missing")
    try:
        return cls(**values)
    except ValueError as error:  # of the model's sections, which know no other
        raise ConfigError(str(error)) from error


def _model_parts(base: Any, tree: dict[str, Any], path: str) -> tuple[Any, dict[str, Any]]:
    """What a model section names instead of spelling it out: its preset, a file of answers."""
    if "preset" in tree:
        try:
            base = preset(tree["preset"])
        except (KeyError, ValueError, TypeError) as error:
            raise ConfigError(f"{path}preset: {tree['preset']!r} is not a preset") from error
    if isinstance(tree.get("answers"), str):
        tree = {**tree, "answers": read_answers(tree["answers"])}
    return base, tree


def _unknown_key(path: str, key: str, cls: type) -> str:
    names = [f.name for f in dataclasses.fields(cls)]
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f"did you mean {path}{near[0]}?" if near else f"known keys: {', '.join(names)}"
    return f"unknown config key {path}{key}; {hint}"


def _convert(hint: Any, value: Any, old: Any, path: str) -> Any:  # noqa: C901 - one case per type
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        inner = [a for a in arguments if a is not type(None)]
        return _convert(inner[0], value, old, path)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            choices = ", ".join(map(str, arguments))
            raise ConfigError(f"{path} must be one of {choices}, not {_shown(value)}")
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        return _build(hint, value, old, f"{path}.")
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{path} must be a mapping, not {_shown(value)}")
        if arguments[1] is Any:  # a phase: settings, and no names of the user's own
            return _merge(old, value, RunConfig)
        kept = {} if isinstance(value, _Given) else dict(old or {})
        for key, item in value.items():
            kept[str(key)] = _convert(arguments[1], item, kept.get(str(key)), f"{path}.{key}")
        return kept
    if origin is tuple:
        return _convert_tuple(arguments, value, path)
    return _convert_scalar(hint, value, path)


def _merge(old: Any, new: Any, hint: Any = Any) -> Any:
    """A tree of settings over another, as plain mappings; `hint` is what they will be built as."""
    if not isinstance(new, dict):
        return new
    replaces = isinstance(new, _Given) and get_origin(hint) is dict
    kept = dict(old) if isinstance(old, dict) and not replaces else {}
    for key, value in new.items():
        kept[key] = _merge(kept.get(key), value, _hint_of(hint, key))
    return kept


def _hint_of(hint: Any, key: str) -> Any:
    """What the value of `key` in a tree of settings will be built as."""
    if get_origin(hint) is dict:
        return get_args(hint)[1]
    return get_type_hints(hint).get(key, Any) if dataclasses.is_dataclass(hint) else Any


def _convert_tuple(arguments: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if isinstance(value, str) and arguments == (str, ...):
        value = [value]
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{path} must be a list, not {_shown(value)}")
    if arguments[-1] is Ellipsis:
        kinds = [arguments[0]] * len(value)
    elif len(arguments) != len(value):
        raise ConfigError(f"{path} must have {len(arguments)} entries, not {len(value)}")
    else:
        kinds = list(arguments)
    items = zip(kinds, value, strict=True)
    return tuple(_convert(k, v, None, f"{path}[{i}]") for i, (k, v) in enumerate(items))


def _convert_scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-4 as text
        except ValueError:
            pass
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    cure = "; left out, it keeps its default" if value is None else ""
    raise ConfigError(f"{path} must be {hint.__name__}, not {_shown(value)}{cure}")


def _shown(value: Any) -> str:
    """As a recipe spells it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
