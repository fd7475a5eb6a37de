"""dcdet/config.py: what loads, what is refused and with which words, and what comes back."""

import copy
import math
import os
import pickle
import stat
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dcdet.config import MAX_BYTES, Config, load_config, suggest
from dcdet.errors import MachineError, UserError

EXAMPLE = """\
# a comment
seed: 0
model:
  type: Detector
  depth: 101
  mean: [123.15, 1e-4]
  deform: null
data:
  classes: [cat, 'no']
  train: {root: data/VOC, set: 2007_trainval+2012_trainval}
"""


@pytest.fixture
def example(tmp_path: Path) -> Path:
    path = tmp_path / "example.yaml"
    path.write_text(EXAMPLE)
    return path


def load(tmp_path: Path, content: str | bytes) -> Config:
    path = tmp_path / "c.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return load_config(path)


def refusal(tmp_path: Path, content: str | bytes) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, content)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{tmp_path}/c.yaml:"), message
    return message.removeprefix(f"{tmp_path}/")


def test_values(example: Path) -> None:
    config = load_config(example)
    assert config.plain() == {
        "seed": 0,
        "model": {"type": "Detector", "depth": 101, "mean": [123.15, 0.0001], "deform": None},
        "data": {
            "classes": ["cat", "no"],
            "train": {"root": "data/VOC", "set": "2007_trainval+2012_trainval"},
        },
    }
    assert config.model.depth == config["model"]["depth"] == 101


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E3", 1000.0), ("-2.5e+3", -2500.0), (".5", 0.5), ("3.", 3.0),
        ("0", 0), ("-7", -7), ("+7", 7), ("9223372036854775807", 2**63 - 1),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("1x1", "1x1"), ("2007_test", "2007_test"), ("1.2.3", "1.2.3"), ("y", "y"),
        ("a:b", "a:b"), ("'010'", "010"), ('"on"', "on"), ("'12:30'", "12:30"), ("e5", "e5"),
        ("nULL", "nULL"), ("1e", "1e"), ("-", "-"), ("+.e3", "+.e3"),
    ],
)  # fmt: skip
def test_scalars(tmp_path: Path, text: str, value: object) -> None:
    if text == "-":
        text = "'-'"
    got = load(tmp_path, f"a: {text}\n").a
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    "text",
    ["on", "Off", "YES", "no", "010", "-017", "0o17", "0x1F", "0b1", "12:30", "1:30:45.5", "1_000",
     "2007_2012", "2001-12-14", "2001-12-14 21:59:43", ".nan", ".NaN", ".inf", "-.INF", "nan",
     "inf", "1e999", "-1e999", "9223372036854775808", "-9223372036854775809", "9" * 5000],
)  # fmt: skip
def test_what_yaml_would_change_is_refused(tmp_path: Path, text: str) -> None:
    message = refusal(tmp_path, f"x: 1\na: [1, {text}]\n")
    assert message.startswith("c.yaml:2: ")
    assert text[:50] in message
    assert load(tmp_path, f"a: '{text}'\n").a == text


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "'a' is repeated"),
        ("a: {b: 1, b: 2}\n", 1, "'b' is repeated"),
        ("a:\n\tb: 1\n", 2, "spaces, not tabs"),
        ("a:\t1\n", 1, "spaces, not tabs"),
        (b"\xef\xbb\xbfa: 1\n", 1, "byte order mark"),
        ("a: 1".encode("utf-16"), 1, "byte order mark"),
        (b"a: 1\nb: \x00\n", 2, "U+0000"),
        (b"a: 1\nb: \x1b[0m\n", 2, "U+001B"),
        ('a: "\\0"\n', 1, "U+0000"),
        ('a: "\\ud800"\n', 1, "U+D800"),
        (b"a: 1\nb: caf\xe9\n", 2, "UTF-8"),
        ("", None, "empty"),
        ("# nothing\n", None, "empty"),
        ("---\n", None, "empty"),
        ("- a\n- b\n", None, "list"),
        ("key:value\n", None, "single value"),
        ("a: 1\n---\nb: 2\n", 2, "second document"),
        ("a: 1\n? [b]\n: 1\n", 2, "not a word"),
        ("a: 1\n2: 3\n", 2, "not a word"),
        ("on: 1\n", 1, "'on'"),
        ("a: [1,\n", 2, "not valid YAML"),
        ("a: b: c\n", 1, "not valid YAML"),
        ("a: 'x\n", 2, "not valid YAML"),
        ("a: &x [1]\nb: *x\n", 1, "anchor &x"),
        ("a: *x\n", 1, "alias *x"),
        ("a: 1\n*x : 2\n", 2, "alias *x"),
        ("a: 1\n!!str b: 2\n", 2, "!!str"),
    ],
)
def test_refused_with_its_line(
    tmp_path: Path, content: str | bytes, line: int | None, words: str
) -> None:
    message = refusal(tmp_path, content)
    assert words in message
    assert message.startswith("c.yaml: " if line is None else f"c.yaml:{line}: ")


@pytest.mark.parametrize(
    "tag",
    ["!!python/object/apply:os.system ['touch {m}']", "!!python/object/new:os.system ['touch {m}']",
     "!!python/name:os.system", "!!python/module:os", "!!binary aGk=", "!!set {{a}}", "!!int '1'",
     "!!timestamp 2001-01-01", "!own {{a: 1}}", "!<tag:yaml.org,2002:python/name:os.system> ''",
     "! x", "!!omap [a: 1]"],
)  # fmt: skip
def test_tags_are_refused_and_run_nothing(tmp_path: Path, tag: str) -> None:
    marker = tmp_path / "marker"
    assert "tag" in refusal(tmp_path, f"a: {tag.format(m=marker)}\n")
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    ["[" * 20_000, "a: " + "{a: " * 20_000, "- " * 100_000, "? " * 100_000, "&a " * 40_000,
     "a: [" + "1," * (MAX_BYTES // 2 - 10), "a: [" + "[]," * (MAX_BYTES // 3 - 10),
     "\n".join(" " * i + f"k{i}:" for i in range(300)), "a: '" + "x\n\n" * 40_000,
     "a: 1" + "_" * 100_000 + "x: y: z", "a" * (MAX_BYTES + 1)],
    ids=range(11),
)  # fmt: skip
def test_bombs_end_soon(tmp_path: Path, content: str) -> None:
    start = time.process_time()
    refusal(tmp_path, content)
    assert time.process_time() - start < 2


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    with open(path, "wb") as file:
        file.truncate(100 << 30)  # sparse: reading it would take minutes and all memory
    with pytest.raises(UserError, match="larger than"):
        load_config(path)


@given(st.binary(max_size=200) | st.text(alphabet=" -:?[]{},#&*!|>'\"%@`\n\tab01.e", max_size=60))
def test_any_file_loads_or_is_refused(tmp_path_factory: Any, content: bytes | str) -> None:
    folder = tmp_path_factory.getbasetemp()
    try:
        config = load(folder, content)
    except UserError:
        refusal(folder, content)
        return
    # Whatever loads says what PyYAML itself reads, but for the spellings PyYAML misses.
    text = content if isinstance(content, str) else content.decode()
    assert _like(config.plain(), yaml.safe_load(text))


def _like(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, dict):
        return list(ours) == list(theirs) and all(_like(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(_like, ours, theirs))
    return ours == theirs or (isinstance(ours, float) and ours == float(theirs))


@pytest.mark.parametrize("name", ["", "missing.yaml", "exampel.yaml", ".", "fifo", "a\0b", "loop"])
def test_files_that_cannot_be_read(example: Path, name: str) -> None:
    os.mkfifo(example.parent / "fifo")
    (example.parent / "loop").symlink_to("loop")
    with pytest.raises(UserError) as caught:
        load_config(f"{example.parent}/{name}")
    assert ("'example.yaml'" in str(caught.value)) == (name == "exampel.yaml")


def test_where(example: Path) -> None:
    config = load_config(example, ["model.deform={stages: [c5]}", "seed=3"])
    assert config.where("model.depth") == f"{example}:5"
    assert config.model.where("depth") == f"{example}:5"
    assert config.data.where("train.set") == f"{example}:10"
    assert config.where("data.classes.1") == f"{example}:9"
    assert config.model.where() == f"{example}:3"
    assert config.model.where("absent") == f"{example}:3"
    assert config.where() == str(example)
    assert config.where("seed") == "command line"
    assert config.model.deform.where("stages") == "command line"
    assert config.model.deform.key_path == "model.deform"


def test_overrides(example: Path) -> None:
    config = load_config(
        example,
        ["model.depth=50", "model.mean=[1, 2]", "data.train.root=a=b", "seed=7", "seed=1e-4",
         "model.deform={stages: {c5: [0]}, groups: 4}", "model.deform.groups=2",
         "data.train={type: COCO}"],
    )  # fmt: skip
    assert config.model.depth == 50
    assert config.model.mean == (1, 2)
    assert config.seed == 1e-4
    assert config.model.deform == {"stages": {"c5": (0,)}, "groups": 2}
    assert config.data.train == {"type": "COCO"}
    # Lines of what was replaced are forgotten.
    assert config.where("data.train.root") == "command line"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.dept=50", "did you mean 'depth'?"),
        ("modle.depth=50", "did you mean 'model.depth'?"),
        ("depth=50", "did you mean 'model.depth'?"),
        ("classes=[a]", "did you mean 'data.classes'?"),
        ("data.tarin={}", "did you mean 'train'?"),
        ("qqqq=1", "known: seed, model, data"),
        ("model.deform.groups=4", "model.deform={...}"),
        ("seed.x=1", "has no keys of its own"),
        ("seed", "not key.path=value"),
        ("=1", "not key.path=value"),
        ("model..depth=1", "not key.path=value"),
        ("seed=", "write null"),
        ("seed=on", "true or false"),
        ("seed=[1", "not valid YAML"),
        ("seed={a: 1, a: 2}", "repeated"),
        ("seed=!!python/name:os.system", "!!python"),
        ("seed=1\0", "U+0000"),
        ("seed=*x", "alias"),
        ("model.depth.items=1", "no keys of its own"),
        ("keys=1", "known"),
    ],
)
def test_refused_overrides(example: Path, override: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(example, [override])
    assert str(caught.value).startswith("command line: ")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "write",
    [
        lambda c: setattr(c, "seed", 1), lambda c: c.__setitem__("seed", 1),
        lambda c: delattr(c, "seed"), lambda c: c.__delitem__("seed"), lambda c: c.update(seed=1),
        lambda c: c.pop("seed"), lambda c: c.popitem(), lambda c: c.clear(),
        lambda c: c.setdefault("new", 1), lambda c: c.__ior__({"seed": 1}),
        lambda c: setattr(c.model, "depth", 1), lambda c: c.model.mean.__setitem__(0, 1.0),
    ],
)  # fmt: skip
def test_read_only(example: Path, write: Any) -> None:
    config = load_config(example)
    before = config.plain()
    with pytest.raises((TypeError, AttributeError)):
        write(config)
    assert config.plain() == before


def test_unknown_attribute_suggests(example: Path) -> None:
    config = load_config(example)
    with pytest.raises(AttributeError, match="did you mean 'model'"):
        _ = config.modle
    assert not hasattr(config, "nothing")
    assert config.get("nothing") is None


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))]
)
def test_copies_keep_everything(example: Path, duplicate: Any) -> None:
    config = load_config(example)
    other = duplicate(config)
    assert other == config
    assert type(other.model) is Config
    assert other.model.where("depth") == f"{example}:5"
    with pytest.raises(TypeError):
        other.seed = 1


def test_plain_is_free_to_change(example: Path) -> None:
    config = load_config(example)
    plain = config.plain()
    plain["model"]["mean"].append(3)
    assert len(config.model.mean) == 2
    assert type(plain["model"]) is dict


def test_keys_that_are_names_of_methods(tmp_path: Path) -> None:
    config = load(tmp_path, "items: 1\nplain: 2\nwhere: 3\n_path: 4\n")
    assert config["items"] == 1
    assert config.plain() == {"items": 1, "plain": 2, "where": 3, "_path": 4}
    assert copy.deepcopy(config) == config


def test_dump_reloads(example: Path) -> None:
    config = load_config(example, ["model.depth=50"])
    out = example.parent / "out.yaml"
    config.dump(out)
    assert load_config(out).plain() == config.plain()
    assert out.read_text().startswith("# written by: ")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(out.stat().st_mode) == 0o666 & ~mask
    assert sorted(p.name for p in example.parent.iterdir()) == ["example.yaml", "out.yaml"]


_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Cn")))
    | st.sampled_from(["1e-4", "on", "No", "010", "12:30", "null", "~", "", " a", "a ", "# x",
                       "0o7", "1_0", "!a", "&a", "*a", "a: b", "- a", "nan", ".5", "1e5", "'", '"',
                       "a\nb", "\n", "\ta", "=", "<<", "...", "---", "\u2028", "\x85", "\ufeff"])
)  # fmt: skip
_KEYS = st.sampled_from(["a", "on", "1", "null", "x y", "", "a.b", "é"]) | st.text(
    "abc", min_size=1
)
_TREES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(_KEYS, _TREES, min_size=1, max_size=4))
def test_every_tree_survives_dump_and_load(tmp_path_factory: Any, tree: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "tree.yaml"
    Config(tree).dump(path)
    assert repr(load_config(path).plain()) == repr(Config(tree).plain())


def test_dump_names_what_stands_in_its_way(example: Path) -> None:
    config = load_config(example)
    with pytest.raises(UserError, match="cannot be written"):
        config.dump(example.parent / "missing" / "x.yaml")
    with pytest.raises(UserError, match="cannot be written"):
        config.dump(example / "x.yaml")


def test_dump_to_a_full_disk(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = example.parent / "out.yaml"
    out.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match="No space left"):
        load_config(example).dump(out)
    assert out.read_text() == "old"
    assert sorted(p.name for p in example.parent.iterdir()) == ["example.yaml", "out.yaml"]


def test_suggest() -> None:
    assert suggest("dept", ["depth", "type"]) == "did you mean 'depth'?"
    assert suggest("resnet", ["ResNet"]) == "did you mean 'ResNet'?"
    assert suggest("zzz", ["a", "b"]) == "known: a, b"
    assert suggest("zzz", []) == ""
    assert suggest("zzz", range(100)).endswith(" 19, ...")


def test_floats_are_exact(tmp_path: Path) -> None:
    config = load(tmp_path, f"a: {math.pi!r}\nb: 5e-324\n")
    assert (config.a, config.b) == (math.pi, 5e-324)
