"""Config files: one complete YAML per experiment, read into a read-only tree that knows its lines.

The YAML read here is plain data. What YAML 1.1 would silently turn into something else (`on`,
`010`, `12:30`, a date) is refused by name, and so is whatever could build objects or grow without
bound (tags, anchors, aliases). `1e-4` is a number.
"""

import difflib
import errno
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from easydict import EasyDict
from yaml.reader import Reader

from dcdet.errors import MachineError, UserError

MAX_BYTES = 128 * 1024  # a config of 1,200 classes has 25 KB; this much is read in about 1 s
MAX_DEPTH = 50
COMMAND_LINE = "command line"

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_CONSTANTS = {"": None, "~": None, "null": None, "true": True, "false": False}
_TRAPS = [
    (re.compile(r"(?i:yes|no|on|off)"), "write true or false, or quote it if it is a word"),
    (re.compile(r"(?i:[-+]?\.?(inf|nan))"), "numbers here are finite; quote it if it is a word"),
    (re.compile(r"[-+]?0[0-9_]+"), "write it without the leading 0, or quote it if it is a word"),
    (re.compile(r"[-+]?0[box][0-9a-fA-F_]+"), "write it in decimal, or quote it if it is a word"),
    (re.compile(r"[-+]?[0-9.]+_[0-9._]*"), "write it without _, or quote it if it is a word"),
    (re.compile(r"[-+]?[0-9_]+(:[0-5]?[0-9])+(\.[0-9_]*)?"), "quote it if it is a word"),
    (re.compile(r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt\s].*)?"), "quote it if it is a word"),
]

KeyPath = tuple[str, ...]
Places = dict[KeyPath, str]


@dataclass(frozen=True)
class Origin:
    """What all nodes of one config share: the place of every key, and the user's modules."""

    places: Places
    imports: tuple[str, ...] = ()


class Config(EasyDict):
    """A read-only mapping: `config.model.depth` and `config["model"]["depth"]`; lists are tuples.

    Writing raises TypeError. It pickles and copies. `where` tells which line a value came from.
    """

    def __init__(self, values: dict[str, Any], path: KeyPath = (), origin: Origin = Origin({})):
        dict.__init__(self, values)
        # Python attributes, not keys: EasyDict's own __setattr__ would make them keys.
        self.__dict__.update(_path=path, _origin=origin)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            hint = suggest(name, self)
            raise AttributeError(f"the config has no key '{name}' ({hint})") from None

    def _refuse(self, *_: object, **__: object) -> None:
        raise TypeError("a config is read-only; change it in its file or by key.path=value")

    __setattr__ = __setitem__ = __delattr__ = __delitem__ = __ior__ = _refuse
    update = setdefault = pop = popitem = clear = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return Config, (dict(self), self._path, self._origin)

    @property
    def key_path(self) -> str:
        """The keys that lead from the root to this node, joined by dots."""
        return ".".join(self._path)

    @property
    def origin(self) -> Origin:
        """What this node shares with the whole config."""
        return self._origin

    def where(self, key_path: str = "") -> str:
        """FILE:LINE of a key below this node, "command line" if it was overridden there.

        Without a key, or where the key is absent, the place of the nearest section around it.
        """
        path = self._path + tuple(key_path.split(".") if key_path else ())
        places = self._origin.places
        while path and path not in places:
            path = path[:-1]
        return places.get(path, "config")

    def plain(self) -> dict[str, Any]:
        """The same tree as new dictionaries and lists, free to change."""
        return _plain(self)

    def dump(self, path: str | os.PathLike[str]) -> None:
        """Write this tree as YAML that `load_config` reads back to the same values; atomically.

        Raises UserError where `path` cannot be written, MachineError where the disk is full.
        """
        command = "".join(c if c.isprintable() else "?" for c in shlex.join(sys.argv))
        text = yaml.dump(
            self.plain(),
            Dumper=_Dumper,
            default_flow_style=None,
            sort_keys=False,
            allow_unicode=True,
            width=100,
        )
        _write_atomically(Path(path), f"# written by: {command}\n{text}")


def load_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, then apply `key.path=value` overrides to keys that exist.

    Raises UserError naming FILE:LINE and what to write instead.
    """
    name = os.fspath(path)
    text = _read(name)
    tree, places = _parse(text, lambda line: f"{name}:{line}")
    if not isinstance(tree, dict):
        got = "empty" if tree is None else "a list" if isinstance(tree, list) else "a single value"
        hint = "a config is a mapping; write 'key: value', with a space after the colon"
        raise UserError(name, f"the file is {got}", hint)
    places[()] = name
    for override in overrides:
        _override(tree, places, override)
    imports = tree.get("imports")
    names = [name for name in imports if isinstance(name, str)] if isinstance(imports, list) else []
    return _freeze(tree, (), Origin(places, tuple(names)))


def suggest(word: str, words: Iterable[object]) -> str:
    """A hint that names the word nearest to `word`, or the known words if none is near."""
    known = [str(w) for w in words]
    by_lower = {w.lower(): w for w in reversed(known)}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1)
    if near:
        return f"did you mean '{by_lower[near[0]]}'?"
    shown = [*known[:20], "..."] if len(known) > 20 else known
    return f"known: {', '.join(shown)}" if known else ""


def _read(name: str) -> str:
    try:
        if not os.path.exists(name):
            folder = Path(name).parent
            others = [p.name for p in folder.glob("*.yaml")] if folder.is_dir() else []
            near = difflib.get_close_matches(Path(name).name, others, n=1, cutoff=0.8)
            raise UserError(name, "no such file", f"did you mean '{near[0]}'?" if near else "")
        if not os.path.isfile(name):
            raise UserError(name, "not a file", "a config is a YAML file")
        with open(name, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UserError(name, f"cannot be read: {getattr(error, 'strerror', error)}") from error
    if len(data) > MAX_BYTES:
        raise UserError(name, f"larger than {MAX_BYTES // 1024} KB", "is this really a config?")
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{name}:1", "begins with a byte order mark", "save it as plain UTF-8")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        what = f"not UTF-8 (byte 0x{data[error.start]:02x})"
        raise UserError(f"{name}:{line}", what, "save it as plain UTF-8") from error
    bad = Reader.NON_PRINTABLE.search(text)
    if bad:
        line = text.count("\n", 0, bad.start()) + 1
        raise UserError(f"{name}:{line}", f"control character U+{ord(bad.group()):04X}")
    return text


def _parse(text: str, at: Callable[[int], str], path: KeyPath = ()) -> tuple[Any, Places]:
    """YAML text -> (tree of dict, list and scalars, place of every key); `at` names a line."""
    places: Places = {}
    events = yaml.parse(text, Loader=yaml.SafeLoader)
    try:
        next(events)  # the stream's start
        if isinstance(next(events), yaml.StreamEndEvent):
            return None, places
        tree = _node(next(events), events, at, path, places)
        next(events)  # the document's end
        extra: Any = next(events)
        if not isinstance(extra, yaml.StreamEndEvent):
            raise UserError(at(extra.start_mark.line + 1), "a second document begins here")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(str(error.problem or error.context).split())
        hint = "indent with spaces, not tabs" if "\\t" in problem else ""
        line = mark.line + 1 if mark else 1
        raise UserError(at(line), f"not valid YAML: {problem}", hint) from error
    return tree, places


def _node(
    event: Any, events: Iterator[Any], at: Callable[[int], str], path: KeyPath, places: Places
) -> Any:
    """The value that begins with `event`, taking its other events from `events`."""
    place = at(event.start_mark.line + 1)
    places.setdefault(path, place)
    if event.anchor is not None:
        kind = "alias *" if isinstance(event, yaml.AliasEvent) else "anchor &"
        raise UserError(place, f"{kind}{event.anchor} is not allowed", "write the value out")
    if event.tag is not None:
        hint = "configs hold plain values only; quote a word that begins with !"
        tag = event.tag.replace("tag:yaml.org,2002:", "!!")
        raise UserError(place, f"tag {tag} is not allowed", hint)
    if isinstance(event, yaml.ScalarEvent):
        bad = Reader.NON_PRINTABLE.search(event.value)  # written as an escape: "\x00"
        if bad:
            raise UserError(place, f"control character U+{ord(bad.group()):04X}")
        return _scalar(event.value, place) if event.implicit[0] else event.value
    if len(path) >= MAX_DEPTH:
        raise UserError(place, f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(event, yaml.SequenceStartEvent):
        items: list[Any] = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            items.append(_node(event, events, at, (*path, str(len(items))), places))
        return items
    mapping: dict[str, Any] = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        place = at(event.start_mark.line + 1)
        key = _node(event, events, at, (*path, ""), {})
        if not isinstance(key, str):
            raise UserError(place, f"key {short(key)} is not a word", "quote it")
        inner = (*path, key)
        if key in mapping:
            raise UserError(place, f"key '{key}' is repeated", f"first: {places[inner]}")
        places[inner] = place
        mapping[key] = _node(next(events), events, at, inner, places)
    return mapping


def _scalar(text: str, place: str) -> Any:
    """What a plain (unquoted) word means."""
    if text.lower() in _CONSTANTS and text in (text.lower(), text.title(), text.upper()):
        return _CONSTANTS[text.lower()]
    if _INTEGER.fullmatch(text):
        # The length is tested first: int() on a million digits takes long.
        if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
            raise UserError(place, f"{short(text)} does not fit into 64 bits")
        return int(text)
    for trap, hint in _TRAPS:
        if trap.fullmatch(text):
            raise UserError(place, f"{short(text)} is ambiguous in YAML", hint)
    if _FLOAT.fullmatch(text):
        value = float(text)
        if not math.isfinite(value):
            raise UserError(place, f"{short(text)} is too large for a number")
        return value
    return text


def short(value: object) -> str:
    """A value as one short line for messages."""
    text = repr(_plain(value))
    return text if len(text) <= 60 else f"{text[:56]} ..."


def _override(tree: dict[str, Any], places: Places, override: str) -> None:
    key_path, equals, text = override.partition("=")
    path = tuple(key_path.split("."))
    if not equals or not all(path):
        raise UserError(COMMAND_LINE, f"'{override}' is not key.path=value")
    if not text.strip():
        raise UserError(COMMAND_LINE, f"'{override}' has no value", "write null for none")
    node: Any = tree
    for depth, key in enumerate(path):
        if not isinstance(node, dict):
            parent = ".".join(path[:depth])
            what = f"'{parent}' is {short(node)} and has no keys of its own"
            raise UserError(COMMAND_LINE, what, f"write {parent}={{...}} to replace it")
        if key not in node:
            # The right key at the wrong place: `depth=50` for `model.backbone.depth=50`.
            elsewhere = [".".join(p) for p in places if p[-1:] == path[-1:]]
            hint = suggest(elsewhere[0], elsewhere) if len(elsewhere) == 1 else suggest(key, node)
            raise UserError(COMMAND_LINE, f"no key '{key}' in '{override}'", hint)
        if depth < len(path) - 1:
            node = node[key]
    bad = Reader.NON_PRINTABLE.search(text)
    if bad:
        raise UserError(COMMAND_LINE, f"control character U+{ord(bad.group()):04X}")
    value, value_places = _parse(text, lambda _: COMMAND_LINE, path)
    for stale in [p for p in places if p[: len(path)] == path]:
        del places[stale]
    places.update(value_places)
    places[path] = COMMAND_LINE
    node[path[-1]] = value


def _freeze(value: Any, path: KeyPath, origin: Origin) -> Any:
    if isinstance(value, dict):
        values = {k: _freeze(v, (*path, k), origin) for k, v in value.items()}
        return Config(values, path, origin)
    if isinstance(value, list):
        return tuple(_freeze(v, (*path, str(i)), origin) for i, v in enumerate(value))
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


class _Dumper(yaml.SafeDumper):
    """Quotes every word that `_scalar` would not read back as itself."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_str(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    try:
        plain = value.isprintable() and _scalar(value, "") == value
    except UserError:
        plain = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain else '"')


_Dumper.add_representer(str, _represent_str)


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        what = f"cannot be written: {error.strerror}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise MachineError(f"{path}: {what}") from error
        raise UserError(path, what) from error
