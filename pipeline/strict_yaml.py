"""YAML of people: only plain values, no key twice in a mapping, and a mistake told in one line."""

from typing import Any

import yaml

from glipv2.pipeline.errors import ConfigError


def parse_yaml(data: str | bytes, where: str) -> Any:
    """The value of a document; ConfigError that begins with `where` and names line and column."""
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        return yaml.load(text, Loader=_StrictLoader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}, not valid YAML: it is no UTF-8 text") from error
    except _TwiceError as error:
        raise ConfigError(f"{where}, {error}") from error
    except yaml.MarkedYAMLError as error:
        problem = error.problem or error.context or "it can't be read"
        raise ConfigError(f"{where}, {_at(error)}not valid YAML: {problem}{_of(error)}") from error
    except (yaml.reader.ReaderError, ValueError, RecursionError) as error:
        # of bytes that are no text, of a day such as 2024-13-41, of thousands of brackets
        position = f"position {error.position}: " if hasattr(error, "position") else ""
        reason = getattr(error, "reason", error)
        raise ConfigError(f"{where}, {position}not valid YAML: {reason}") from error


class _TwiceError(Exception):
    pass


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML would keep the later unseen."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        # as it is written: later `<<` puts keys here that may well be those of the mapping itself
        node = super().compose_mapping_node(anchor)
        first: dict[str, Any] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and first.setdefault(key.value, key) is not key:
                before, here = first[key.value].start_mark, key.start_mark
                raise _TwiceError(
                    f"line {here.line + 1}, column {here.column + 1}: the key {key.value} stands "
                    f"there twice, first in line {before.line + 1}; keep one"
                )
        return node


def _at(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    return f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""


def _of(error: yaml.MarkedYAMLError) -> str:
    """What was being read, and where that begins."""
    if not error.problem or not error.context:
        return ""
    begins = f" that begins in line {error.context_mark.line + 1}" if error.context_mark else ""
    return f" ({error.context}{begins})"
