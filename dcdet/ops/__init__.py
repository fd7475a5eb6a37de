"""Deformable convolution, RoI pooling and non-maximum suppression.

Each op checks its arguments, then runs on a compiled kernel (compiled.py) or, where there is none,
on torch; slow twins for tests stand in reference.py. The position-sensitive pooling ops take RoIs
in the 2017 release's inclusive pixels (rois.py), deform_roi_pool in continuous ones.
"""

from dcdet.ops.deform_conv import deform_conv2d
from dcdet.ops.deform_psroi_pool import deform_psroi_pool
from dcdet.ops.deform_roi_pool import deform_roi_pool, roi_align
from dcdet.ops.nms import batched_nms, nms
from dcdet.ops.psroi_pool import psroi_pool
from dcdet.ops.soft_nms import batched_soft_nms, soft_nms

__all__ = [
    "batched_nms",
    "batched_soft_nms",
    "deform_conv2d",
    "deform_psroi_pool",
    "deform_roi_pool",
    "nms",
    "psroi_pool",
    "roi_align",
    "soft_nms",
]
