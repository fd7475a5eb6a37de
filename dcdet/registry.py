"""Names in a config -> classes, and every key checked against the signature it is meant for.

The registry is a table that is never written at run time. Users add classes of their own with
`imports: [my_package.my_module]`; a `type` that is not in the table is looked up there.
"""

import contextlib
import functools
import importlib
import inspect
import json
import sys
import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from dcdet.config import Config, short, suggest
from dcdet.errors import UserError

if TYPE_CHECKING:
    from dcdet.datasets.loader import DataSection
    from dcdet.engine.evaluate import TestSection
    from dcdet.engine.solver import SolverSection

T = TypeVar("T")

# What the code knows and hands over itself, so that a config cannot contradict it.
_FROM_MODEL = frozenset(
    {"num_classes", "in_channels", "stride", "strides", "pixels", "delta_limit"}
)
SUPPLIED: dict[str, frozenset[str]] = {
    "model": frozenset(),
    "backbone": _FROM_MODEL,
    "neck": _FROM_MODEL,
    "rpn": _FROM_MODEL,
    "roi_head": _FROM_MODEL,
    "mask_head": _FROM_MODEL,
    "dataset": frozenset({"classes", "pixels"}),
    "evaluator": frozenset({"reader"}),
}


@dataclass(frozen=True)
class Experiment:
    """A whole config. Nodes with a `type` stay nodes: `build` turns them into objects."""

    seed: int
    model: Config
    data: "DataSection"
    solver: "SolverSection"
    test: "TestSection"
    imports: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError("seed: must not be negative")


@functools.cache
def roles() -> dict[str, dict[str, type]]:
    """The table: role -> name -> class. Imports torch, hence a function."""
    from dcdet.datasets.cityscapes import Cityscapes
    from dcdet.datasets.coco import COCO
    from dcdet.datasets.label_folder import LabelFolder
    from dcdet.datasets.shapes import Shapes
    from dcdet.datasets.voc import VOC
    from dcdet.datasets.voc_segmentation import VOCSegmentation
    from dcdet.evaluators.coco import COCOEvaluator
    from dcdet.evaluators.miou import MIoUEvaluator
    from dcdet.evaluators.voc import VOCEvaluator
    from dcdet.models.box_head import BoxHead
    from dcdet.models.deeplab import DeepLab
    from dcdet.models.fpn import FPN
    from dcdet.models.mask_head import MaskHead
    from dcdet.models.resnet import ResNet
    from dcdet.models.rfcn_head import RFCNHead
    from dcdet.models.rpn import RPNHead
    from dcdet.models.timm_backbone import TimmBackbone
    from dcdet.models.two_stage import TwoStageDetector

    return {
        "model": {"TwoStageDetector": TwoStageDetector, "DeepLab": DeepLab},
        "backbone": {"ResNet": ResNet, "TimmBackbone": TimmBackbone},
        "neck": {"FPN": FPN},
        "rpn": {"RPNHead": RPNHead},
        "roi_head": {"RFCNHead": RFCNHead, "BoxHead": BoxHead},
        "mask_head": {"MaskHead": MaskHead},
        "dataset": {
            "VOC": VOC,
            "COCO": COCO,
            "Shapes": Shapes,
            "LabelFolder": LabelFolder,
            "Cityscapes": Cityscapes,
            "VOCSegmentation": VOCSegmentation,
        },
        "evaluator": {
            "VOCEvaluator": VOCEvaluator,
            "COCOEvaluator": COCOEvaluator,
            "MIoUEvaluator": MIoUEvaluator,
        },
    }


def check(config: Config) -> Experiment:
    """Check every key of the tree, building its sections but no model, reader or evaluator.

    Raises UserError for the first key that is unknown, missing, of a wrong type or out of range,
    and for parts of different tasks.
    """
    experiment = _construct(Experiment, _arguments(Experiment, config, ""), config)
    _check_task(config)
    return experiment


def task_of(config: Config) -> str:
    """What the config's model is for: "detection", or "segmentation". Raises UserError."""
    return getattr(lookup(config.model, "model"), "task", "detection")


def _check_task(config: Config) -> None:
    task = task_of(config)
    for section, key, role in (
        (config.data, "train", "dataset"), (config.data, "test", "dataset"),
        (config.test, "evaluator", "evaluator"),
    ):  # fmt: skip
        if section[key] is None:
            continue
        other = getattr(lookup(section[key], role), "task", "detection")
        if other != task:
            raise UserError(
                section[key].where("type"), f"{section[key].type} is for {other}",
                f"{config.model.type} is for {task}",
            )  # fmt: skip
    # Sizes and objects are known before an image is read; a segmentation is resized to its image,
    # which added pixels are no part of.
    detection = {"filter_empty": False, "aspect_grouping": False, "pad_images": 1}
    others = {"random_scale": None, "crop": None} if task == "detection" else detection
    kind = "detection" if others is detection else "segmentation"
    for key, none in others.items():
        if config.data.get(key, none) != none:
            hint = f"write {json.dumps(none)}"
            raise UserError(config.data.where(key), f"'{key}' is for {kind}", hint)


def build(node: Config, role: str, **context: Any) -> Any:
    """The object that `node` describes: its `type` looked up under `role`, its keys checked.

    `context` holds what the code supplies; what the class does not ask for is left out, but only
    names of SUPPLIED. Nodes with a `type` of their own (a model's backbone) come built, through
    `context`. Raises UserError.
    """
    cls = lookup(node, role)
    for name in SUPPLIED[role] - set(_parameters(cls)):
        context.pop(name, None)
    return _construct(cls, {**_arguments(cls, node, role, context), **context}, node)


def lookup(node: Config, role: str) -> type:
    """The class that a node's `type` names."""
    table = roles()[role]
    if "type" not in node:
        raise UserError(node.where(), f"'{node.key_path}' has no type", suggest("", table))
    name = node["type"]
    if not isinstance(name, str):
        raise UserError(node.where("type"), f"'type' must be a name, got {short(name)}")
    if name in table:
        return table[name]
    for module_name in node.origin.imports:
        module = _import(module_name, node.origin.places.get(("imports",), "imports"))
        cls = getattr(module, name, None)
        # Classes that the module itself only imports do not count.
        if inspect.isclass(cls) and cls.__module__.split(".")[0] == module_name.split(".")[0]:
            _require(cls, role, node)
            return cls
    raise UserError(node.where("type"), f"no {role} is called '{name}'", suggest(name, table))


def _import(name: str, place: str) -> types.ModuleType:
    if name.split(".")[0] in sys.stdlib_module_names:
        raise UserError(place, f"'{name}' belongs to Python itself and holds no models")
    try:
        return importlib.import_module(name)
    except Exception as error:  # a user's module may fail in any way
        what = f"cannot import '{name}': {type(error).__name__}: {error}"
        hint = "is it installed, or its folder in PYTHONPATH?"
        raise UserError(place, what, hint) from error


def _require(cls: type, role: str, node: Config) -> None:
    """A user's class must be meant for its role: a config cannot call just anything."""
    from torch import nn

    if role in ("dataset", "evaluator"):
        needed = SUPPLIED[role] - {"pixels"} if hasattr(cls, "task") else SUPPLIED[role]
        what, fits = f"take {', '.join(sorted(needed))}", False
        with contextlib.suppress(ValueError, TypeError):
            fits = needed <= set(inspect.signature(cls).parameters)
    else:
        what, fits = "be a torch.nn.Module", issubclass(cls, nn.Module)
    if not fits:
        message = f"{cls.__module__}.{cls.__name__} cannot be a {role}: it must {what}"
        raise UserError(node.where("type"), message)


def _role(node: Config, key: str) -> str | None:
    """The role of the node at `key`, None for a key that holds something else."""
    if node.key_path == "data" and key in ("train", "test"):
        return "dataset"
    return key if key in SUPPLIED and key != "dataset" else None


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    parameters = dict(inspect.signature(cls).parameters)
    for parameter in parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            what = f"takes {parameter}, but a config can fill named parameters only"
            raise UserError(f"{cls.__module__}.{cls.__name__}", what)
    return parameters


def _hints(cls: type) -> dict[str, Any]:
    if not is_dataclass(cls):
        return get_type_hints(inspect.getattr_static(cls, "__init__"))
    return get_type_hints(cls, localns=_sections() if cls is Experiment else None)


def _sections() -> dict[str, Any]:
    from dcdet.datasets import loader
    from dcdet.engine import evaluate, solver

    modules = {"DataSection": loader, "SolverSection": solver, "TestSection": evaluate}
    return {name: getattr(module, name) for name, module in modules.items()}


def _arguments(cls: type, node: Config, role: str, context: Collection[str] = ()) -> dict[str, Any]:
    """The node's values, checked, as arguments for `cls`; those in `context` are left out.

    `role` is "" for a section, which has no `type`.
    """
    title = cls.__name__ if role else f"'{node.key_path}'" if node.key_path else "a config"
    parameters, hints = _parameters(cls), _hints(cls)
    supplied = SUPPLIED[role] if role else frozenset()
    options = [name for name in parameters if name not in supplied]
    arguments: dict[str, Any] = {}
    for key, value in node.items():
        child_role, place = _role(node, key), node.where(key)
        if (role and key == "type") or (child_role and key in context):
            continue
        if key in supplied and key in parameters:
            hint = "leave it out; it follows from the rest of the config"
            raise UserError(place, f"'{key}' of {title} cannot be set here", hint)
        if key not in options:
            raise UserError(place, f"{title} has no option '{key}'", suggest(key, options))
        if key not in hints:
            raise UserError(place, f"{title} does not say of which type '{key}' is", "annotate it")
        if child_role is None or (value is None and type(None) in get_args(hints[key])):
            arguments[key] = _convert(value, hints[key], key, place)
        elif isinstance(value, Config):
            _arguments(lookup(value, child_role), value, child_role)
            arguments[key] = value
        else:
            what = f"'{key}' must be a mapping with a type, got {short(value)}"
            raise UserError(place, what, suggest(str(value), roles()[child_role]))
    for name in options:
        required = parameters[name].default is inspect.Parameter.empty
        if required and name not in arguments and name not in context:
            known = name in hints and _role(node, name) is None
            hint = f"it must be {_describe(hints[name])}" if known else ""
            raise UserError(node.where(), f"{title} lacks '{name}'", hint)
    return arguments


def _construct(cls: type[T], arguments: dict[str, Any], node: Config) -> T:
    """The object; its ValueError("key: message") becomes a UserError with the key's line."""
    try:
        return cls(**arguments)
    except ValueError as error:
        key, colon, message = str(error).partition(": ")
        if not colon or key.partition(".")[0].partition("[")[0] not in _parameters(cls):
            raise
        raise UserError(node.where(key), f"'{key}' {message}") from error


def _convert(value: Any, hint: Any, name: str, place: str) -> Any:
    """`value` as the type `hint` says. Raises UserError naming what it must be."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(value, hint, name, place)
    if origin is Literal:
        for choice in args:
            if value == choice and type(value) is type(choice):
                return value
        hint_text = suggest(value, args) if isinstance(value, str) else ""
        raise UserError(place, f"'{name}' must be {_describe(hint)}, got {short(value)}", hint_text)
    if is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, Config):
            return _construct(hint, _arguments(hint, value, ""), value)
    elif origin in (list, tuple, Sequence):
        fixed = origin is tuple and args[-1] is not Ellipsis
        if isinstance(value, tuple) and (not fixed or len(value) == len(args)):
            hints = args if fixed else args[:1] * len(value)
            items = [
                _convert(item, hint, f"{name}[{index}]", place)
                for index, (item, hint) in enumerate(zip(value, hints, strict=True))
            ]
            return tuple(items) if origin is tuple else items
    elif origin in (dict, Mapping):
        if isinstance(value, Config):
            return {
                key: _convert(item, args[1], f"{name}.{key}", value.where(key))
                for key, item in value.items()
            }
    elif hint is float:
        if type(value) in (int, float):
            return float(value)
    elif hint in (bool, int, str, type(None)):
        if type(value) is hint:
            return value
    else:
        raise UserError(place, f"'{name}' is of type {hint}, which a config cannot fill")
    advice = ""
    if isinstance(value, str) and hint in (bool, int, float):
        with contextlib.suppress(ValueError):
            float(value)
            advice = "remove the quotes"
    raise UserError(place, f"'{name}' must be {_describe(hint)}, got {short(value)}", advice)


def _convert_union(value: Any, hint: Any, name: str, place: str) -> Any:
    members = [member for member in get_args(hint) if member is not type(None)]
    if value is None and len(members) < len(get_args(hint)):
        return None
    # A whole number stays one where both int and float are allowed.
    exact = [member for member in members if member is type(value)]
    errors = []
    for member in exact or members:
        try:
            return _convert(value, member, name, place)
        except UserError as error:
            # Something inside a section or a list is wrong: more telling than the choice of types.
            if f"'{name}' must" not in error.what:
                raise
            errors.append(error)
    what = f"'{name}' must be {_describe(hint)}, got {short(value)}"
    raise UserError(place, what, errors[0].hint)


def _describe(hint: Any) -> str:
    """A type in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(member) for member in args)
    if origin is Literal:
        *others, last = map(str, args)
        return f"{', '.join(others)} or {last}" if others else last
    if origin is tuple and args[-1] is not Ellipsis:
        return f"a list of {len(args)}"
    if origin in (list, tuple, Sequence):
        return "a list, each " + _describe(args[0])
    if origin in (dict, Mapping):
        return "a mapping, each value " + _describe(args[1])
    if is_dataclass(hint):
        return "a mapping with " + ", ".join(field.name for field in fields(hint))
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    if hint is type(None):
        return "null"
    return words.get(hint, str(hint))
