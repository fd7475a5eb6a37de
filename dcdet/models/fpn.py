"""Feature pyramid network. B images.

Source: Lin et al., Feature Pyramid Networks; fpn/symbols/*.py of the 2017 release.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from dcdet.errors import require
from dcdet.models.init import init_layers


class FPN(nn.Module):
    """{"c2": ..., "c5": ...} -> {"p2": ..., "p5": ..., "p6": ...}, all of the same channels.

    Args:
        in_channels, strides: of the backbone's maps, by name; supplied by code.
        in_features: the maps that are read, finest first; "c2" becomes "p2".
        channels: of every map that comes out.
        extra: one coarser map, of twice the last stride: "conv", a strided 3x3 convolution of the
            last map that is read; "pool", every other pixel of the last map that comes out, as in
            mmdetection, torchvision and detectron2; or "none".
        init_std: of new weights; None: see init_layers.
    Attributes:
        channels, strides: of each map that comes out, by name.
    """

    def __init__(
        self,
        in_channels: dict[str, int],
        strides: dict[str, int],
        in_features: list[str],
        channels: int,
        extra: Literal["conv", "pool", "none"],
        init_std: float | None,
    ) -> None:
        super().__init__()
        known = [name for name in in_channels if name in in_features]
        require(
            len(known) > 0 and in_features == known,
            "in_features", f"some of {', '.join(in_channels)} in that order", in_features,
        )  # fmt: skip
        require(channels >= 1, "channels", "at least 1", channels)
        require(init_std is None or init_std > 0, "init_std", "positive, or null", init_std)
        self.lateral = nn.ModuleDict(
            {name: nn.Conv2d(in_channels[name], channels, 1) for name in in_features}
        )
        self.output = nn.ModuleDict(
            {_pyramid(name): nn.Conv2d(channels, channels, 3, padding=1) for name in in_features}
        )
        self.strides = {_pyramid(name): strides[name] for name in in_features}
        init_layers(*self.lateral.values(), *self.output.values(), std=init_std)
        self.extra: nn.Module | None = None
        last = in_features[-1]
        self.extra_source = _pyramid(last) if extra == "pool" else last
        if extra != "none":
            self.extra_name = f"p{int(last[1:]) + 1}"
            self.strides[self.extra_name] = 2 * strides[last]
        if extra == "conv":
            self.extra = nn.Conv2d(in_channels[last], channels, 3, stride=2, padding=1)
            init_layers(self.extra, std=init_std)
        elif extra == "pool":
            self.extra = nn.MaxPool2d(1, stride=2)
        self.channels = dict.fromkeys(self.strides, channels)
        self.in_features = in_features

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Maps (B, C, H, W) by name -> maps by name, finest first."""
        maps: dict[str, Tensor] = {}
        x: Tensor | None = None
        for name in reversed(self.in_features):
            lateral = self.lateral[name](features[name])
            x = lateral if x is None else lateral + F.interpolate(x, lateral.shape[2:])
            maps = {_pyramid(name): self.output[_pyramid(name)](x)} | maps
        if self.extra is not None:
            maps[self.extra_name] = self.extra((features | maps)[self.extra_source])
        return maps


def _pyramid(name: str) -> str:
    return "p" + name[1:]
