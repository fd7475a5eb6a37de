"""Weighted sums of the rows of a table, and the two halves of their gradient.

The work of every deformable op, in channels-last form: a bilinear sample is a weighted sum of four
rows, a pooled bin a weighted sum of many. `embedding_bag` reads each row once and writes each sum
once, at memory speed, on CPU and CUDA.

Shapes: table (R, C), n sums of k rows each: indices and weights (n, k), sums (n, C).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def index_dtype(rows: int) -> torch.dtype:
    """The narrowest integer that numbers `rows` rows; int32 sorts twice as fast as int64."""
    return torch.int32 if rows < 2**31 else torch.int64


def gather_rows(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """sums[i] = sum over j of weights[i, j] * table[indices[i, j]] -> (n, C)."""
    return F.embedding_bag(indices, table, per_sample_weights=weights, mode="sum")


def row_dots(grad: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    """The gradient of the weights: grad (n, C) -> (n, k), grad[i] . table[indices[i, j]].

    The ATen kernel behind embedding_bag's own backward: the public way to it is autograd, which
    does not record inside an operator.
    """
    sums, per_sum = indices.shape
    starts = torch.arange(0, sums * per_sum, per_sum, device=indices.device, dtype=indices.dtype)
    owner = torch.arange(sums, device=indices.device, dtype=indices.dtype)
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad, table, indices.reshape(-1), starts, owner.repeat_interleave(per_sum), 0, -1
    )
    return dots.view(sums, per_sum)


def scatter_rows(
    grad: Tensor, indices: Tensor, owners: Tensor, weights: Tensor | None, into: Tensor
) -> None:
    """The gradient of the table: into[indices[e]] += weights[e] * grad[owners[e]] for entries e.

    Shapes: grad (n, C), indices, owners and weights (E,), into (R, C). Entries are sorted by row,
    so that this is again a sum of rows: parallel, and the same bits every time.
    """
    if indices.numel() == 0:
        return
    rows, order = indices.sort(stable=True)
    first, last = int(rows[0]), int(rows[-1])
    wanted = torch.arange(first, last + 1, device=rows.device, dtype=rows.dtype)
    starts = torch.searchsorted(rows, wanted)
    sorted_weights = None if weights is None else weights[order]
    into[first : last + 1] += F.embedding_bag(
        owners[order], grad, starts, per_sample_weights=sorted_weights, mode="sum"
    )
