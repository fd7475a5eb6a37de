"""Deformable R-FCN (ResNet-101, VOC) in MXNet beside dcdet: the same weights, image and CPU.

`python tools/mxnet_speed.py --mxnet PYTHON [--runs 7] [--threads 2] [--folder DIR]`: PYTHON is that
of an environment with `mxnet==1.9.1` and `numpy<1.24`. MXNet makes random weights and writes them;
`dcdet convert` reads the file; then both are asked in turn for one test pass: from the image to
RoIs, probabilities and boxes. dcdet's `predict`, which also normalises and chooses detections, is
timed, too. The file and both networks' results stay in the folder.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "rfcn" / "rfcn_dcn_r101_voc.yaml"
MEAN = (123.15, 115.90, 103.06)
SIZE = (600, 1000)
log = logging.getLogger("mxnet_speed")
Passes = dict[str, Callable[[], list[Any]]]


def symbol(mx: Any) -> Any:
    """The release's test network out of MXNet's operators."""
    sym, contrib = mx.sym, mx.sym.contrib

    def conv(
        x: Any, name: str, channels: int, side: int, step: int = 1, pad: int = 0, bias: bool = True
    ) -> Any:
        return sym.Convolution(
            x, name=name, num_filter=channels, kernel=(side, side), stride=(step, step),
            pad=(pad, pad), dilate=(max(1, pad if step == 1 else 1),) * 2, no_bias=not bias,
        )  # fmt: skip

    def norm(x: Any, name: str) -> Any:
        return sym.BatchNorm(x, name=name, use_global_stats=True, fix_gamma=False, eps=1e-5)

    def block(x: Any, name: str, width: int, step: int, project: bool) -> Any:
        last = name[0] == "5"  # dilated by 2 and deformable
        res, bn = f"res{name}_branch", f"bn{name}_branch"
        y = sym.relu(norm(conv(x, f"{res}2a", width, 1, step, bias=False), f"{bn}2a"))
        if last:
            offset = conv(y, f"{res}2b_offset", 72, 3, pad=2)
            y = contrib.DeformableConvolution(
                data=y, offset=offset, name=f"{res}2b", num_filter=width, kernel=(3, 3),
                pad=(2, 2), dilate=(2, 2), num_deformable_group=4, no_bias=True,
            )  # fmt: skip
        else:
            y = conv(y, f"{res}2b", width, 3, pad=1, bias=False)
        y = sym.relu(norm(y, f"{bn}2b"))
        y = norm(conv(y, f"{res}2c", 4 * width, 1, bias=False), f"{bn}2c")
        if project:
            x = norm(conv(x, f"{res}1", 4 * width, 1, step, bias=False), f"{bn}1")
        return sym.relu(x + y)

    x = sym.relu(norm(conv(sym.Variable("data"), "conv1", 64, 7, 2, 3, bias=False), "bn_conv1"))
    x = sym.Pooling(x, kernel=(3, 3), stride=(2, 2), pool_type="max", pooling_convention="full")
    c4 = None
    for stage, number in zip((2, 3, 4, 5), (3, 4, 23, 3), strict=True):
        for i in range(number):
            letter = "abc"[i] if stage in (2, 5) else f"b{i}" if i else "a"
            step = 2 if i == 0 and stage in (3, 4) else 1
            x = block(x, f"{stage}{letter}", 32 << (stage - 1), step, i == 0)
        c4 = x if stage == 4 else c4
    rpn = sym.relu(conv(c4, "rpn_conv_3x3", 512, 3, pad=1))
    score = sym.Reshape(conv(rpn, "rpn_cls_score", 18, 1), shape=(0, 2, -1, 0))
    score = sym.Reshape(sym.SoftmaxActivation(score, mode="channel"), shape=(0, 18, -1, 0))
    rois = contrib.Proposal(
        cls_prob=score, bbox_pred=conv(rpn, "rpn_bbox_pred", 36, 1),
        im_info=sym.Variable("im_info"), feature_stride=16, scales=(8, 16, 32),
        ratios=(0.5, 1, 2), rpn_pre_nms_top_n=6000, rpn_post_nms_top_n=300,
        threshold=0.7, rpn_min_size=0,
    )  # fmt: skip
    hidden = sym.relu(conv(x, "conv_new_1", 1024, 1))

    def pool(maps: Any, trans: Any, channels: int) -> Any:
        moved = {"no_trans": True} if trans is None else {"trans": trans, "part_size": 7}
        return contrib.DeformablePSROIPooling(
            data=maps, rois=rois, output_dim=channels, spatial_scale=1 / 16, group_size=7,
            pooled_size=7, sample_per_part=4, trans_std=0.1, **moved,
        )  # fmt: skip

    def head(name: str, channels: int, shifts: int) -> Any:
        trans = pool(conv(hidden, f"{name}_offset_t", 49 * shifts, 1), None, shifts)
        pooled = pool(conv(hidden, name, 49 * channels, 1), trans, channels)
        return sym.Reshape(pooled.mean(axis=(2, 3)), shape=(-1, channels))

    scores = sym.softmax(head("rfcn_cls", 21, 42), axis=1)
    return sym.Group([rois, scores, head("rfcn_bbox", 8, 2)])


def image() -> Any:
    """The image (3, H, W) uint8: smooth noise."""
    import numpy as np

    coarse = np.random.RandomState(0).randint(0, 256, (3, SIZE[0] // 8, SIZE[1] // 8))
    return coarse.repeat(8, axis=1).repeat(8, axis=2).astype(np.uint8)


def mxnet_passes(folder: Path) -> Passes:
    """MXNet's network, whose weights are written to the folder."""
    import mxnet as mx  # type: ignore[import-not-found]
    import numpy as np

    random = np.random.RandomState(1)
    height, width = SIZE
    executor = symbol(mx).simple_bind(
        ctx=mx.cpu(), grad_req="null", data=(1, 3, height, width), im_info=(1, 3)
    )
    file = {}
    for kind, arrays in (("arg", executor.arg_dict), ("aux", executor.aux_dict)):
        for name, array in arrays.items():
            if name in ("data", "im_info"):
                continue
            if name.endswith("gamma"):
                # The last of a block's three small: 33 blocks add up.
                value = np.full(array.shape, 0.2 if "branch2c" in name else 1.0)
            elif name.endswith("moving_var"):
                value = np.ones(array.shape)
            elif name.endswith("weight"):
                # Small enough that scores are no ties at 0 and 1, and boxes stay in the image.
                small = {"rpn_bbox": 0.002, "rpn_cls": 0.02, "rfcn": 0.02}
                gain = next((g for start, g in small.items() if name.startswith(start)), 1.4)
                gain = 0.02 if "offset" in name else gain
                value = random.normal(0, gain / np.prod(array.shape[1:]) ** 0.5, array.shape)
            else:
                value = np.zeros(array.shape)
            array[:] = value
            file[f"{kind}:{name}"] = array
    mx.nd.save(str(folder / "mxnet.params"), file)
    executor.arg_dict["im_info"][:] = np.array([[height, width, 1.0]])
    mean = np.array(MEAN).reshape(3, 1, 1)
    executor.arg_dict["data"][:] = (image() - mean)[None]
    return {"network": lambda: [out.asnumpy() for out in executor.forward(is_train=False)]}


def dcdet_passes(folder: Path) -> Passes:
    """dcdet's network with the converted weights."""
    import torch

    from dcdet import build_model, load_config, load_weights
    from dcdet.engine.runtime import keep_freed_memory
    from dcdet.structures import Batch, Target

    keep_freed_memory()
    model: Any = build_model(load_config(CONFIG)).eval()
    load_weights(model, folder / "dcdet.pth")
    nobody = torch.zeros(0, 4)
    target = Target("image", SIZE, nobody, nobody[:, 0].long(), nobody)
    batch = Batch(torch.from_numpy(image())[None], [SIZE], [target], [1.0], [0])
    corners = torch.tensor([0, 0, 0, 1, 1])

    @torch.no_grad()
    def network() -> list[Any]:
        features = model.features(batch)
        [boxes] = model.rpn.proposals(model.rpn(features), batch.sizes, batch.scales)
        rois = torch.nn.functional.pad(boxes, (1, 0))
        raw = model.roi_head(features, rois)
        return [(rois - corners).numpy(), raw.logits.softmax(1).numpy(), raw.deltas.numpy()]

    def predict() -> list[Any]:
        [found] = model.predict(batch)
        return [found.boxes.numpy()]

    return {"network": network, "predict": predict}


def work(which: str, folder: Path) -> None:
    """Answer each line of stdin, the name of a pass, with the seconds that it took."""
    import numpy as np

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    passes = (mxnet_passes if which == "mxnet" else dcdet_passes)(folder)
    print(0.0, file=answers, flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        results = passes[line.strip()]()
        seconds = time.perf_counter() - start
        if line.strip() == "network":
            np.savez(folder / f"{which}.npz", *results)
        print(seconds, file=answers, flush=True)


class Worker:
    """A process that runs passes of one framework."""

    def __init__(self, python: str, which: str, folder: Path, threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [python, __file__, "--work", which, "--folder", str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self.answer()

    def answer(self) -> float:
        """The next number; the whole script ends where the process has ended."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        return float(line) if line else sys.exit(4)

    def run(self, name: str) -> float:
        """Seconds of one pass."""
        assert self.process.stdin
        print(name, file=self.process.stdin, flush=True)
        return self.answer()


def agreement(folder: Path) -> str:
    """How many RoIs both networks have, and how far their probabilities are apart."""
    import numpy as np

    theirs, ours = (list(np.load(folder / f"{w}.npz").values()) for w in ("mxnet", "dcdet"))
    distance = np.abs(theirs[0][:, None] - ours[0][None]).max(-1)
    near, index = distance.min(1) < 5e-3, distance.argmin(1)
    apart = np.abs(theirs[1][near] - ours[1][index[near]]).max(initial=0)
    return f"{near.sum()} of {len(near)} RoIs are the same, probabilities within {apart:.1e}"


def main() -> None:
    """Time both in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mxnet", metavar="PYTHON")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=ROOT / "output" / "mxnet_speed")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.work, args.folder)
    if not args.mxnet:
        parser.error("--mxnet: name the Python of an environment with MXNet")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    theirs = Worker(args.mxnet, "mxnet", folder, args.threads)
    words = [str(folder / "mxnet.params"), str(folder / "dcdet.pth"), "--config", str(CONFIG)]
    subprocess.run([sys.executable, str(ROOT / "tools" / "convert.py"), *words], check=True)
    ours = Worker(sys.executable, "dcdet", folder, args.threads)
    times: dict[str, list[float]] = {}
    for round_ in range(args.runs + 2):
        for worker, name in ((theirs, "network"), (ours, "network"), (ours, "predict")):
            time.sleep(0.3)  # until the other's threads sleep
            seconds = worker.run(name)
            if round_ > 1:  # the first two are not counted
                title = f"{'MXNet' if worker is theirs else 'dcdet'} {name}"
                times.setdefault(title, []).append(seconds)
    for title, values in times.items():
        median = statistics.median(values)
        log.info("%s: fastest %.3f s, median %.3f s", title, min(values), median)
    ratio = min(times["MXNet network"]) / min(times["dcdet network"])
    log.info("MXNet / dcdet: %.2f times", ratio)
    log.info("%s", agreement(folder))
    (folder / "times.json").write_text(json.dumps(times))


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    main()
