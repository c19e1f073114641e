"""Option files: nested YAML, read into dataclasses and checked by their types, and by their `check` where they have one.

An unknown key, a wrong type or a value out of range is an InputError that names the file and the key.
"""

import dataclasses
import difflib
import math
import reprlib
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from utils.errors import InputError

T = TypeVar("T")


def load_options(kind: type[T], path: str, overrides: list[str] = ()) -> T:
    """Read an option file, apply `key=value` overrides (dotted keys; list entries by number) and check everything."""
    content = read_yaml(path)
    content["file"] = path
    for override in overrides:
        _override(content, override)
    return parse(kind, content, f"{path}: ")


class UniqueKeys(yaml.SafeLoader):
    """yaml.safe_load's loader, but a key that is given twice is an error: of the two, PyYAML would take the second in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0][:80]} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: str) -> dict:
    """An option file as plain keys and values, unchecked."""
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), UniqueKeys)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror.lower()}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:             # PyYAML raises ValueError at dates such as 2024-13-45
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected keys and values, found {'nothing' if content is None else shown(content)}")
    return content


def parse(kind: Any, value: Any, where: str) -> Any:
    """Convert plain YAML data to the type `kind`; `where` opens the error messages."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise InputError(f"{where.rstrip('. :')}: {shown(value)}, expected keys and values")
        hints = typing.get_type_hints(kind)
        for key in value:
            if key not in hints:
                raise InputError(f"{where}{str(key)[:80]}: unknown option{_nearest(key, hints)}")
        for entry in dataclasses.fields(kind):
            if entry.default is entry.default_factory is dataclasses.MISSING and entry.name not in value:
                raise InputError(f"{where}{entry.name}: missing")
        result = kind(**{key: parse(hints[key], entry, f"{where}{key}.") for key, entry in value.items()})
        if hasattr(result, "check"):
            try:
                result.check()
            except InputError as error:
                whole = str(error).startswith("expected")       # not about one of its keys
                raise InputError(f"{where.rstrip('. :')}: {error}" if whole else f"{where}{error}") from None
        return result
    where = where.rstrip(".")
    if origin is list:
        if not isinstance(value, list):
            raise InputError(f"{where}: {shown(value)}, expected a list")
        return [parse(arguments[0], entry, f"{where}[{i}].") for i, entry in enumerate(value)]
    if origin is Literal:
        if not isinstance(value, (str, int)) or value not in arguments:
            choices = ", ".join(str(choice) for choice in arguments if choice != "")
            raise InputError(f"{where}: {shown(value)}, expected one of {choices}{_nearest(value, arguments)}")
        return value
    if origin in (types.UnionType, typing.Union):           # the choice between a word and something else
        return parse(arguments[not isinstance(value, str)], value, f"{where}.")
    if kind is float and isinstance(value, str):            # PyYAML reads 2e-4 as a string
        try:
            value = float(value)
        except ValueError:
            pass
    if kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not kind:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise InputError(f"{where}: {shown(value)}, expected {names[kind]}")
    if kind is int and abs(value) >= 2**53:
        raise InputError(f"{where}: a number of {value.bit_length()} bits, expected one below 2^53")
    if kind is str and not value.isprintable():
        raise InputError(f"{where}: {shown(value)}, expected printable characters only")
    if kind is float and not math.isfinite(value):
        raise InputError(f"{where}: {value}, expected a finite number")
    return value


def dump(options: Any) -> str:
    """Resolved options as YAML that load_options reads."""
    return yaml.safe_dump(dataclasses.asdict(options), sort_keys=False, default_flow_style=None, width=120)


def _nearest(key: Any, known: Any) -> str:
    near = difflib.get_close_matches(str(key), [str(k) for k in known], n=1)
    return f", did you mean {near[0]}?" if near else ""


def _override(content: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {override}: expected key=value")
    try:
        value = yaml.safe_load(text) if text else ""
    except (yaml.YAMLError, ValueError, RecursionError):
        value = text
    *parents, last = key.replace("[", ".").replace("]", "").split(".")
    here: Any = content
    for i, part in enumerate([*parents, last]):
        if isinstance(here, list):
            if not part.isdecimal() or int(part) >= len(here):
                raise InputError(f"--set {override}: no entry {part} in {'.'.join(parents[:i])}, which has {len(here)}")
            part = int(part)
        elif not isinstance(here, dict):
            raise InputError(f"--set {override}: {'.'.join(parents[:i])} has no options of its own")
        if i == len(parents):
            here[part] = value
        elif isinstance(here, dict):
            here = here.setdefault(part, {})
        else:
            here = here[part]


def shown(value: Any) -> str:
    """A value of an option file for an error's line: the start of what is long or nested."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80
