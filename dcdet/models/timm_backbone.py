"""Any convolutional network of timm that gives maps of strides 4 to 32. B images.

timm is optional: `pip install timm`, or the extra `dcdet[timm]`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dcdet.config import suggest
from dcdet.errors import UserError, first_line
from dcdet.models.resnet import STAGES

STRIDES = (4, 8, 16, 32)
PROBE = (128, 160)  # h, w: no network is made for just this size


class TimmBackbone(nn.Module):
    """Images (B, 3, H, W) -> {"c2": ..., "c5": ...}, the network's maps of strides 4, 8, 16, 32.

    Images are normalised by the detector: give model.pixel_mean and model.pixel_std what
    `timm.get_pretrained_cfg(name)` says, times 255. Sides that are multiples of 32
    (data.pad_multiple) suit every network. The networks are timm's own: none of their convolutions
    deform.

    Args:
        name: as timm.list_models() has it, with or without a tag of weights: resnet50.a1_in1k.
        freeze_norm: batch normalisation stays as the weights have it. Else it is trained, over the
            images of each process alone.
        pretrained: True downloads timm's weights; a file has them (.safetensors, .pth); or None.
    Attributes:
        channels, strides: of each map, by name.
    Raises UserError without timm, ValueError for a network that will not do.
    """

    def __init__(self, name: str, freeze_norm: bool, pretrained: bool | str | None) -> None:
        super().__init__()
        self.name, self.pretrained = name, pretrained
        self.net: Any = self._create()
        self.channels = dict(zip(STAGES, self.net.feature_info.channels(), strict=True))
        self.strides = dict(zip(STAGES, STRIDES, strict=True))
        self.channel_axis = 3 if getattr(self.net, "output_fmt", "NCHW") == "NHWC" else 1
        self.frozen: list[nn.Module] = []
        if freeze_norm:
            self.frozen = [layer for layer in self.modules() if isinstance(layer, _BatchNorm)]
        for layer in self.frozen:
            layer.requires_grad_(False)
        self._try()

    def _create(self, pretrained: bool = False) -> Any:
        """timm's network, cut to the four maps."""
        try:
            import timm
        except ImportError as error:
            what = "TimmBackbone needs timm, which is not installed"
            raise UserError("model.backbone.type", what, "pip install timm") from error
        if not timm.is_model(self.name):
            hint = suggest(self.name, timm.list_models())
            raise ValueError(f"name: timm has no network '{self.name}' ({hint})")
        try:
            known = timm.create_model(self.name, features_only=True).feature_info.info
        except Exception as error:  # of many types
            what = f"timm gives no maps of '{self.name}': {first_line(error)}"
            raise ValueError(f"name: {what}") from error
        last = {item["reduction"]: index for index, item in enumerate(known)}
        if not last.keys() >= set(STRIDES):
            found = ", ".join(map(str, last))
            raise ValueError(
                f"name: '{self.name}' has maps of stride {found}; wanted: 4, 8, 16, 32"
            )
        return timm.create_model(
            self.name, pretrained=pretrained, features_only=True,
            out_indices=tuple(last[stride] for stride in STRIDES),
        )  # fmt: skip

    @torch.no_grad()
    def _try(self) -> None:
        """Some networks take one image size only, or have maps of other sizes than they say."""
        height, width = PROBE
        self.eval()
        try:
            maps = self(torch.zeros(1, 3, height, width))
        except Exception as error:  # of many types
            what = f"does not take images of any size: {first_line(error)}"
            raise ValueError(f"name: '{self.name}' {what}") from error
        for stage, x in maps.items():
            stride = self.strides[stage]
            wanted = (1, self.channels[stage], height // stride, width // stride)
            if x.shape != wanted:
                what = f"of stride {stride} is {tuple(x.shape)}, wanted {wanted}"
                raise ValueError(f"name: the map of '{self.name}' {what}")
        self.train()

    def train(self, mode: bool = True) -> "TimmBackbone":
        """As nn.Module.train, but frozen normalisation keeps its statistics."""
        super().train(mode)
        for layer in self.frozen:
            layer.train(False)
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W) -> maps by name."""
        return {
            stage: x.movedim(self.channel_axis, 1)
            for stage, x in zip(STAGES, self.net(images), strict=True)
        }

    def published_weights(self) -> dict[str, Tensor]:
        """timm's weights, downloaded, by own names; where that fails, whatever timm raises."""
        return {f"net.{name}": x for name, x in self._create(pretrained=True).state_dict().items()}

    def own_names(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of timm's whole network, or of a detector with this backbone, by own names.

        Parts that this module does not have, like the classifier, are left out; unknown weights in
        the parts that it has stay, so that another network's are noticed.
        """
        prefix = "backbone." if any(name.startswith("backbone.net.") for name in weights) else ""
        weights = {
            name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)
        }
        renamed, parts = {}, set()
        for own in self.state_dict():
            for name, part in _published_names(own):
                if name in weights:
                    renamed[own] = weights.pop(name)
                    parts.add(part)
                    break
        strange = {
            name: x for name, x in weights.items()
            if any(name.startswith(part + ".") for part in parts)
        }  # fmt: skip
        return renamed | strange


def _published_names(own: str) -> Iterator[tuple[str, str]]:
    """What a weight may be called in timm's whole network, and the part there that it belongs to.

    Taking maps out of a network, timm puts all of it in `model`, or the first two levels of
    modules in one: `stages.0` becomes `stages_0`.
    """
    yield own, "net"
    name = own.removeprefix("net.")
    for inner in (name, name.removeprefix("model.")):
        yield inner, inner.partition(".")[0]
    part, _, rest = name.partition(".")
    for place, letter in enumerate(part):
        if letter == "_":
            apart = f"{part[:place]}.{part[place + 1 :]}"
            yield f"{apart}.{rest}", apart
