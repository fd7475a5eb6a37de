"""dcdet/registry.py: keys against signatures, with a table of its own; then the real table."""

import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from conftest import ROOT
from torch import nn

from dcdet import registry
from dcdet.config import Config, load_config
from dcdet.errors import UserError


@dataclass(frozen=True)
class Deform:
    stages: dict[str, list[int]]
    groups: int
    border: Literal["zero", "original"] = "zero"

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ValueError(f"groups: must be at least 1, got {self.groups}")


class Net(nn.Module):
    def __init__(
        self,
        in_channels: int,
        depth: Literal[18, 101],
        rate: float,
        deform: Deform | None,
        name: str | list[str] = "net",
        box: tuple[float, float] = (0.0, 1.0),
        frozen: bool = False,
    ) -> None:
        super().__init__()
        if rate <= 0:
            raise ValueError(f"rate: must be positive, got {rate}")
        self.got = {k: v for k, v in locals().items() if k not in ("self", "__class__")}


class Detector(nn.Module):
    def __init__(self, backbone: nn.Module, neck: nn.Module | None, num_classes: int) -> None:
        super().__init__()
        self.backbone, self.neck, self.num_classes = backbone, neck, num_classes


class Photos:
    def __init__(self, root: str, classes: list[str] | None, pixels: str) -> None:
        self.root, self.classes, self.pixels = root, classes, pixels


class Scores:
    def __init__(self, reader: Photos, exact: bool = True) -> None:
        self.reader, self.exact = reader, exact


@dataclass(frozen=True)
class DataSection:
    train: Any
    test: Config | None
    batch_size: int
    classes: list[str] | None = None


@dataclass(frozen=True)
class SolverSection:
    lr: float
    milestones: list[float]


@dataclass(frozen=True)
class TestSection:
    __test__ = False
    evaluator: Any


@pytest.fixture(autouse=True)
def table(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.name.startswith("test_real"):
        return
    roles: dict[str, dict[str, type]] = {
        "model": {"Detector": Detector},
        "backbone": {"Net": Net},
        "neck": {},
        "rpn": {},
        "roi_head": {},
        "dataset": {"Photos": Photos},
        "evaluator": {"Scores": Scores},
    }
    sections = {c.__name__: c for c in (DataSection, SolverSection, TestSection)}
    monkeypatch.setattr(registry, "roles", lambda: roles)
    monkeypatch.setattr(registry, "_sections", lambda: sections)


EXAMPLE = """\
seed: 0
model:
  type: Detector
  num_classes: 3
  backbone:
    type: Net
    depth: 18
    rate: 1
    deform: {stages: {c5: [0, 1]}, groups: 4}
    box: [0, 1e-1]
  neck: null
data:
  train: {type: Photos, root: a}
  test: null
  batch_size: 4
  classes: [cat, dog]
solver: {lr: 1e-3, milestones: [1, 2.5]}
test:
  evaluator: {type: Scores}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(EXAMPLE)
    return path


def test_check_returns_sections(path: Path) -> None:
    experiment = registry.check(load_config(path))
    assert experiment.seed == 0
    assert experiment.imports == ()
    assert experiment.solver == SolverSection(0.001, [1.0, 2.5])
    assert experiment.data.classes == ["cat", "dog"]
    assert type(experiment.data.classes) is list
    assert isinstance(experiment.data.train, Config)
    assert isinstance(experiment.model, Config)


def test_build_converts_to_the_annotated_types(path: Path) -> None:
    config = load_config(path)
    net = registry.build(config.model.backbone, "backbone", in_channels=7, pixels="continuous")
    assert net.got == {
        "in_channels": 7,
        "depth": 18,
        "rate": 1.0,
        "deform": Deform({"c5": [0, 1]}, 4, "zero"),
        "name": "net",
        "box": (0.0, 0.1),
        "frozen": False,
    }
    assert type(net.got["rate"]) is float
    model = registry.build(config.model, "model", backbone=net, neck=None)
    assert (model.backbone, model.neck, model.num_classes) == (net, None, 3)
    reader = registry.build(config.data.train, "dataset", classes=None, pixels="inclusive")
    assert (reader.root, reader.classes, reader.pixels) == ("a", None, "inclusive")
    evaluator = registry.build(config.test.evaluator, "evaluator", reader=reader)
    assert evaluator.reader is reader
    with pytest.raises(TypeError):  # a slip of the code is not hidden
        registry.build(config.model.backbone, "backbone", in_channels=7, chanels=3)


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        # The ten typos of everyday.
        ("depth: 18", "dept: 18", 7, ["Net has no option 'dept'", "did you mean 'depth'?"]),
        ("seed: 0", "sede: 0", 1, ["a config has no option 'sede'", "'seed'"]),
        ("solver:", "slover:", 17, ["no option 'slover'", "did you mean 'solver'?"]),
        ("groups: 4", "group: 4", 9, ["'model.backbone.deform' has no option", "'groups'"]),
        ("type: Net", "type: Nett", 6, ["no backbone is called 'Nett'", "did you mean 'Net'?"]),
        ("type: Photos", "type: photos", 13, ["no dataset", "did you mean 'Photos'?"]),
        ("lr: 1e-3", "lr: '1e-3'", 17, ["'lr' must be a number, got '1e-3'", "remove the quotes"]),
        ("depth: 18", "depth: 19", 7, ["'depth' must be 18 or 101, got 19"]),
        ("depth: 18", "depth: true", 7, ["must be 18 or 101, got True"]),
        ("batch_size: 4", "batch_size: 4.0", 15, ["must be a whole number, got 4.0"]),
        ("batch_size: 4", "batch_size: true", 15, ["must be a whole number, got True"]),
        ("rate: 1", "rate: true", 8, ["'rate' must be a number, got True"]),
        ("rate: 1", "rate: -1", 8, ["'rate' must be positive, got -1"]),
        ("groups: 4", "groups: 0", 9, ["'groups' must be at least 1, got 0"]),
        ("groups: 4", "groups: 4, border: zeros", 9, ["zero or original", "did you mean 'zero'?"]),
        ("groups: 4", "groups: four", 9, ["'groups' must be a whole number, got 'four'"]),
        ("{stages: {c5: [0, 1]}, groups: 4}", "4", 9, ["'deform' must be a mapping with stages"]),
        ("c5: [0, 1]", "c5: [0, x]", 9, ["'stages.c5[1]' must be a whole number, got 'x'"]),
        ("c5: [0, 1]", "c5: 0", 9, ["'stages.c5' must be a list, each a whole number, got 0"]),
        ("    rate: 1\n", "", 5, ["Net lacks 'rate'", "a number"]),
        (", groups: 4", "", 9, ["'model.backbone.deform' lacks 'groups'"]),
        ("    type: Net\n", "", 5, ["'model.backbone' has no type", "Net"]),
        ("  neck: null\n", "", 2, ["Detector lacks 'neck'"]),
        ("box: [0, 1e-1]", "box: [0]", 10, ["'box' must be a list of 2, got [0]"]),
        ("rate: 1\n", "rate: 1\n    frozen: 0\n", 9, ["true or false, got 0"]),
        ("rate: 1\n", "rate: 1\n    name: 3\n", 9, ["text or a list, each text, got 3"]),
        ("rate: 1\n", "rate: 1\n    name: [a, 3]\n", 9, ["'name[1]' must be text, got 3"]),
        ("rate: 1\n", "rate: 1\n    in_channels: 3\n", 9, ["'in_channels' of Net cannot be set"]),
        ("rate: 1\n", "rate: 1\n    num_classes: 3\n", 9, ["no option 'num_classes'"]),
        ("root: a", "root: a, classes: [x]", 13, ["'classes' of Photos cannot be set"]),
        ("{type: Scores}", "{type: Scores, reader: x}", 19, ["'reader' of Scores cannot be set"]),
        ("{type: Scores}", "Scores", 19, ["'evaluator' must be a mapping with a type", "Scores"]),
        ("  neck: null", "  neck: {type: FPN}", 11, ["no neck is called 'FPN'"]),
        ("type: Net", "type: [Net]", 6, ["'type' must be a name"]),
        ("{type: Photos, root: a}", "null", 13, ["'train' must be a mapping with a type"]),
        ("seed: 0", "seed: -1", 1, ["'seed' must not be negative"]),
        ("seed: 0", "seed: 0\n_base_: x.yaml", 2, ["no option '_base_'"]),
        ("seed: 0", "seed: 0\nimports: my_pkg", 2, ["'imports' must be a list"]),
        ("milestones: [1, 2.5]", "milestones: 1", 17, ["'milestones' must be a list"]),
        ("{lr: 1e-3, milestones: [1, 2.5]}", "null", 17, ["'solver' must be a mapping with lr"]),
        ("{lr: 1e-3, milestones", "{type: X, lr: 1e-3, milestones", 17, ["no option 'type'"]),
    ],
)  # fmt: skip
def test_refusals(path: Path, old: str, new: str, line: int, words: list[str]) -> None:
    assert EXAMPLE.count(old) == 1
    path.write_text(EXAMPLE.replace(old, new))

    def use() -> None:
        config = load_config(path)
        registry.check(config)
        registry.build(config.model.backbone, "backbone", in_channels=7)

    with pytest.raises(UserError) as caught:
        use()
    assert str(caught.value).startswith(f"{path}:{line}: ")
    for word in words:
        assert word in str(caught.value)


def test_an_overridden_value_is_blamed_on_the_command_line(path: Path) -> None:
    with pytest.raises(UserError, match="command line: 'batch_size' must be a whole number"):
        registry.check(load_config(path, ["data.batch_size=many"]))


def test_a_bug_in_a_constructor_is_not_blamed_on_the_user(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: object, reader: Photos) -> None:
        raise ValueError("shapes: do not match")

    monkeypatch.setattr(Scores, "__init__", broken)
    with pytest.raises(ValueError, match="shapes: do not match"):
        registry.build(load_config(path).test.evaluator, "evaluator", reader=None)


USER_MODULE = """\
import subprocess
from subprocess import Popen
from torch import nn
from torch.nn import Linear
open({marker!r}, "a").write("imported ")

class MyNet(nn.Module):
    def __init__(self, in_channels: int, depth: int):
        super().__init__()
        self.depth = depth

class Untyped(nn.Module):
    def __init__(self, depth):
        super().__init__()

class Loose(nn.Module):
    def __init__(self, **kwargs: int):
        super().__init__()

class Odd(nn.Module):
    def __init__(self, depth: bytes):
        super().__init__()

class Runner:
    def __init__(self, depth: int):
        open({marker!r}, "a").write("constructed ")

class MyReader:
    def __init__(self, root: str, classes: list[str] | None, pixels: str):
        self.root = root

def function(depth: int): ...
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = tmp_path / "my_pkg_for_dcdet"
    package.mkdir()
    marker = tmp_path / "marker"
    (package / "__init__.py").write_text("from .nets import MyNet\n")
    (package / "nets.py").write_text(USER_MODULE.format(marker=str(marker)))
    (package / "broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [m for m in sys.modules if m.split(".")[0] == package.name]:  # another test's
        del sys.modules[name]
    return marker


def with_import(path: Path, module: str, name: str, keys: str = "depth: 3") -> Config:
    start, end = EXAMPLE.index("    type: Net"), EXAMPLE.index("  neck: null")
    text = EXAMPLE[:start] + f"    type: {name}\n    {keys}\n" + EXAMPLE[end:]
    path.write_text(f"imports: [{module}]\n{text}")
    return load_config(path)


@pytest.mark.parametrize("module", ["my_pkg_for_dcdet.nets", "my_pkg_for_dcdet"])
def test_a_users_class(path: Path, user_module: Path, module: str) -> None:
    config = with_import(path, module, "MyNet")
    registry.check(config)
    assert registry.build(config.model.backbone, "backbone", in_channels=1).depth == 3
    config = with_import(path, module, "MyNet", "dept: 3")
    with pytest.raises(UserError, match=r"MyNet has no option 'dept' \(did you mean 'depth'"):
        registry.check(config)


def test_a_users_reader(path: Path, user_module: Path) -> None:
    path.write_text("imports: [my_pkg_for_dcdet.nets]\n" + EXAMPLE.replace("Photos", "MyReader"))
    reader = registry.build(load_config(path).data.train, "dataset", classes=None, pixels="x")
    assert reader.root == "a"


@pytest.mark.parametrize(
    ("module", "name", "words"),
    [
        ("my_pkg_for_dcdet.nets", "Runner", "must be a torch.nn.Module"),
        ("my_pkg_for_dcdet.nets", "MyReader", "must be a torch.nn.Module"),
        ("my_pkg_for_dcdet.nets", "Popen", "no backbone is called 'Popen'"),
        ("my_pkg_for_dcdet.nets", "Linear", "no backbone is called 'Linear'"),
        ("my_pkg_for_dcdet.nets", "subprocess", "no backbone is called"),
        ("my_pkg_for_dcdet.nets", "function", "no backbone is called"),
        ("my_pkg_for_dcdet.nets", "Untyped", "does not say of which type 'depth' is"),
        ("my_pkg_for_dcdet.nets", "Loose", "takes **kwargs"),
        ("my_pkg_for_dcdet.nets", "Odd", "which a config cannot fill"),
        ("my_pkg_for_dcdet.nest", "MyNet", "cannot import 'my_pkg_for_dcdet.nest'"),
        ("my_pkg_for_dcdet.broken", "MyNet", "ZeroDivisionError"),
        ("subprocess", "Popen", "belongs to Python itself"),
        ("os.path", "Popen", "belongs to Python itself"),
        ("'.nets'", "MyNet", "cannot import"),
        ("''", "MyNet", "cannot import"),
    ],
)
def test_what_imports_cannot_do(
    path: Path, user_module: Path, module: str, name: str, words: str
) -> None:
    with pytest.raises(UserError) as caught:
        registry.check(with_import(path, module, name))
    assert words in str(caught.value)
    assert not user_module.exists() or "constructed" not in user_module.read_text()


def test_nothing_is_imported_unless_named(path: Path, user_module: Path) -> None:
    with pytest.raises(UserError):
        registry.check(load_config(path, ["model.backbone.type=my_pkg_for_dcdet.nets.MyNet"]))
    assert not user_module.exists()


def test_real_table_has_only_classes_that_a_config_can_fill() -> None:
    for role, table in registry.roles().items():
        for name, cls in table.items():
            assert cls.__name__ == name
            hints = registry._hints(cls)
            for parameter in registry._parameters(cls).values():
                assert parameter.kind is not inspect.Parameter.VAR_KEYWORD
                assert parameter.name in hints, f"{role} {name}.{parameter.name} has no annotation"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.stem)
def test_real_configs_are_sound_and_survive_dump_and_load(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    registry.check(config)
    config.dump(tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml")
    assert again == config
    registry.check(again)


def test_real_table_is_complete() -> None:
    assert set(registry.roles()) == set(registry.SUPPLIED)
