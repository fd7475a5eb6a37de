"""ResNet 18/34/50/101 with deformable blocks. Parameter names are torchvision's.

Maps c2..c5 have strides 4, 8, 16, 32 (16 for a dilated c5). Source: He et al., Deep Residual
Learning; Dai et al., Deformable ConvNets; Zhu et al., Deformable ConvNets v2.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from dcdet.errors import require
from dcdet.models.init import init_layers
from dcdet.ops.deform_conv import deform_conv2d

STAGES = ("c2", "c3", "c4", "c5")
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


@dataclass(frozen=True)
class DeformSpec:
    """Which 3x3 convolutions deform, and how.

    `blocks` names block indices of stages, {c4: [-1], c5: [0, 1, 2]}; the block's second
    convolution deforms. `groups`: offset groups. `modulated`: DCNv2, with a mask of
    `mask_scale` * sigmoid. `border`: see ops/deform_conv.py. `offset_dilation`: dilation of the
    convolution that computes the offsets; None: that of the deformable convolution.
    """

    blocks: dict[str, list[int]]
    groups: int
    modulated: bool
    border: Literal["zero", "original"]
    offset_dilation: int | None
    mask_scale: float = 1.0

    def __post_init__(self) -> None:
        for stage in self.blocks:
            if stage not in STAGES:
                raise ValueError(f"blocks: no stage '{stage}', stages are {', '.join(STAGES)}")
        require(self.groups >= 1, "groups", "at least 1", self.groups)
        dilation = self.offset_dilation
        require(
            dilation is None or dilation >= 1, "offset_dilation", "at least 1 or null", dilation
        )


class DeformConv2d(nn.Module):
    """A 3x3 deformable convolution that computes its own offsets from its input.

    The offset convolution starts at zero: at first the layer is a plain convolution (with a
    modulated one's output scaled by mask_scale / 2).
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, dilation: int, spec: DeformSpec
    ) -> None:
        super().__init__()
        wanted = f"a divisor of the layer's {in_channels} channels"
        require(in_channels % spec.groups == 0, "deform.groups", wanted, spec.groups)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3))
        offset_dilation = spec.offset_dilation or dilation
        self.offset = nn.Conv2d(
            in_channels, (27 if spec.modulated else 18) * spec.groups, 3, stride,
            padding=offset_dilation, dilation=offset_dilation,
        )  # fmt: skip
        init_layers(self.offset, std=0.0)
        self.stride, self.dilation, self.spec = stride, dilation, spec

    def offset_and_mask(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Input (B, C, H, W) -> offset (B, 18 * G, H', W') and, if modulated, mask (B, 9 * G, H',
        W') for G offset groups: what `deform_conv2d` is given."""
        offset = self.offset(x)
        if not self.spec.modulated:
            return offset, None
        offset, mask = offset.split([18 * self.spec.groups, 9 * self.spec.groups], dim=1)
        return offset, self.spec.mask_scale * mask.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, O, H', W')."""
        offset, mask = self.offset_and_mask(x)
        return deform_conv2d(
            x, offset, self.weight, stride=self.stride, padding=self.dilation,
            dilation=self.dilation, mask=mask, border=self.spec.border,
        )  # fmt: skip


class FrozenBatchNorm(nn.Module):
    """Batch normalisation whose statistics and affine parameters are constants (buffers)."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (
            ("weight", 1.0),
            ("bias", 0.0),
            ("running_mean", 0.0),
            ("running_var", 1.0),
        ):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, 1e-5
        )

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """forward(x) is x * scale + shift: (C,) each."""
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return scale, self.bias - self.running_mean * scale


class EvalBatchNorm(FrozenBatchNorm):
    """Batch normalisation by constant statistics, with affine parameters that learn.

    Source: norm_eval of mmdetection.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        for name in ("weight", "bias"):
            value = self.get_buffer(name)
            delattr(self, name)
            self.register_parameter(name, nn.Parameter(value))


class BatchNorm(nn.BatchNorm2d):
    """Trainable batch normalisation over the images of all processes together."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        x32 = x.float()
        count = x32.new_full((1,), x32.numel() // x32.shape[1])
        sums = torch.cat([x32.sum((0, 2, 3)), x32.square().sum((0, 2, 3)), count])
        sums = all_reduce(sums)
        mean, square = (sums[:-1] / sums[-1]).chunk(2)
        var = square - mean.square()
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * sums[-1] / (sums[-1] - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return (x32 * scale[:, None, None] + shift[:, None, None]).to(x.dtype)


def convolve(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """norm(conv(x)); where both are linear, as one convolution, which saves a pass over memory."""
    if isinstance(conv, nn.Conv2d) and isinstance(norm, FrozenBatchNorm):
        scale, shift = norm.scale_and_shift()
        weight = conv.weight * scale[:, None, None, None]
        return F.conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation)
    return norm(conv(x))


NORMS = {"frozen_bn": FrozenBatchNorm, "eval_bn": EvalBatchNorm, "bn": BatchNorm}


class Block(nn.Module):
    """A residual block: two 3x3 convolutions (basic), or 1x1, 3x3, 1x1 (bottleneck)."""

    def __init__(
        self, in_channels: int, channels: int, stride: int, dilation: int, bottleneck: bool,
        stride_in: str, norm: type[nn.Module], deform: DeformSpec | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.out_channels = channels * (4 if bottleneck else 1)
        # The strided convolution of a basic block is its first.
        first, second = (stride, 1) if not bottleneck or stride_in == "1x1" else (1, stride)
        if bottleneck:
            self.conv1 = nn.Conv2d(in_channels, channels, 1, first, bias=False)
        else:
            self.conv1 = nn.Conv2d(in_channels, channels, 3, first, dilation, dilation, bias=False)
        self.bn1 = norm(channels)
        self.conv2: nn.Module
        if deform is None:
            self.conv2 = nn.Conv2d(channels, channels, 3, second, dilation, dilation, bias=False)
        else:
            self.conv2 = DeformConv2d(channels, channels, second, dilation, deform)
        self.bn2 = norm(channels)
        self.last = bottleneck
        if bottleneck:
            self.conv3 = nn.Conv2d(channels, self.out_channels, 1, bias=False)
            self.bn3 = norm(self.out_channels)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != self.out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, self.out_channels, 1, stride, bias=False),
                norm(self.out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_channels, H', W')."""
        y = F.relu(convolve(self.conv1, self.bn1, x), inplace=True)
        y = convolve(self.conv2, self.bn2, y)
        if self.last:
            y = convolve(self.conv3, self.bn3, F.relu(y, inplace=True))
        down = self.downsample
        shortcut = x if down is None else convolve(down[0], down[1], x)
        return F.relu(y + shortcut, inplace=True)


class ResNet(nn.Module):
    """Images (B, 3, H, W) -> {"c2": ..., "c5": ...}.

    Args:
        depth: 18, 34, 50 or 101.
        stride_in: where a bottleneck's stride stands: "1x1" (Caffe, MXNet, MSRA weights) or
            "3x3" (torchvision weights). Without meaning for depth 18 and 34.
        norm: "frozen_bn" (constants; with pretrained weights), "eval_bn" (constant statistics,
            trained weights; as in mmdetection) or "bn" (trained).
        stem_pool: "ceil": 3x3 stride 2 without padding, sizes rounded up, as the 2017 release;
            "pad": padded by 1, as torchvision.
        dilate_c5: c5 keeps stride 16 and dilates its 3x3 convolutions by 2.
        freeze_to: stages up to this one get no gradient: 0 none, 1 the stem, 2 stem and c2, ...
        deform: deformable convolutions, or None.
        pretrained: a file of weights, "torchvision" or "torchvision_v1" (downloaded once), or None.
    Attributes:
        channels, strides: of each map, by name.
    """

    def __init__(
        self,
        depth: Literal[18, 34, 50, 101],
        stride_in: Literal["1x1", "3x3"],
        norm: Literal["frozen_bn", "eval_bn", "bn"],
        stem_pool: Literal["ceil", "pad"],
        dilate_c5: bool,
        freeze_to: Literal[0, 1, 2, 3, 4, 5],
        deform: DeformSpec | None,
        pretrained: str | None,
    ) -> None:
        super().__init__()
        norm_layer = NORMS[norm]
        bottleneck = depth >= 50
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = norm_layer(64)
        self.pool_padding = 1 if stem_pool == "pad" else 0
        self.channels: dict[str, int] = {}
        self.strides: dict[str, int] = {}
        self.pretrained = pretrained
        in_channels, total_stride = 64, 4
        for index, stage in enumerate(STAGES):
            dilation = 2 if stage == "c5" and dilate_c5 else 1
            stride = 1 if index == 0 or dilation == 2 else 2
            total_stride *= stride
            number = BLOCKS[depth][index]
            deformed = _block_indices(deform, stage, number)
            blocks = []
            for position in range(number):
                block = Block(
                    in_channels, 64 << index, stride if position == 0 else 1, dilation,
                    bottleneck, stride_in, norm_layer, deform if position in deformed else None,
                )  # fmt: skip
                in_channels = block.out_channels
                blocks.append(block)
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
            self.channels[stage], self.strides[stage] = in_channels, total_stride
        self._init_weights()
        frozen = ([self.conv1, self.bn1] if freeze_to else []) + [
            getattr(self, f"layer{index}") for index in range(1, freeze_to)
        ]
        for module in frozen:
            module.requires_grad_(False)
        self.frozen = frozen

    def train(self, mode: bool = True) -> "ResNet":
        """As nn.Module.train, but frozen stages keep their statistics."""
        super().train(mode)
        for module in self.frozen:
            module.train(False)
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W) -> maps by name."""
        x = F.relu(convolve(self.conv1, self.bn1, images), inplace=True)
        padding = self.pool_padding
        x = F.max_pool2d(x, 3, 2, padding, ceil_mode=padding == 0)
        maps = {}
        for index, stage in enumerate(STAGES):
            x = getattr(self, f"layer{index + 1}")(x)
            maps[stage] = x
        return maps

    def deformable_layers(self) -> dict[str, dict[str, DeformConv2d]]:
        """By stage, the deformable convolutions in the order they run, called stage.block; stages
        without any are left out."""
        stages: dict[str, dict[str, DeformConv2d]] = {}
        for index, stage in enumerate(STAGES):
            for position, block in enumerate(getattr(self, f"layer{index + 1}")):
                if isinstance(block.conv2, DeformConv2d):
                    stages.setdefault(stage, {})[f"{stage}.{position}"] = block.conv2
        return stages

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, DeformConv2d) or (
                isinstance(module, nn.Conv2d) and module.bias is None
            ):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules():
            # A trained block starts as the identity: Goyal et al., ImageNet in 1 Hour, 5.1.
            if isinstance(module, Block) and isinstance(module.bn2, BatchNorm):
                last = module.bn3 if module.last else module.bn2
                nn.init.zeros_(last.get_parameter("weight"))


def _block_indices(deform: DeformSpec | None, stage: str, number: int) -> set[int]:
    wanted = deform.blocks.get(stage, []) if deform else []
    for index in wanted:
        if not -number <= index < number:
            raise ValueError(f"deform.blocks.{stage}: there is no block {index} of {number}")
    return {index % number for index in wanted}
