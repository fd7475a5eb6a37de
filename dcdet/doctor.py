"""What is installed, what works, and how to mend what does not."""

import importlib
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable
from importlib import metadata

from dcdet import __version__

# Module, package name in the registry, and whether dcdet can do without it.
PACKAGES = [
    ("torch", "torch", False),
    ("torchvision", "torchvision", False),
    ("numpy", "numpy", False),
    ("cv2", "opencv-python-headless", False),
    ("PIL", "pillow", False),
    ("pycocotools.mask", "pycocotools", False),
    ("yaml", "pyyaml", False),
    ("easydict", "easydict", False),
    ("tensorboard", "tensorboard", False),
    ("faster_coco_eval", "faster-coco-eval", True),
]


def doctor(write: Callable[[str], None]) -> int:
    """Report line by line through `write`; 0 where all is well, 4 where something is missing."""
    write(f"dcdet {__version__}, Python {platform.python_version()}, {platform.platform()}")
    write(f"{sys.executable}, {os.cpu_count()} CPU cores")
    reports = [_report(*package, write) for package in PACKAGES]
    well = all(reports) and _try_torch(write)
    free = shutil.disk_usage(".").free / 1e9
    write(f"{free:.0f} GB free on this disk")
    for tool in ("c++", "nvcc"):
        write(f"{tool}: {shutil.which(tool) or 'none (not needed)'}")
    write("all is well" if well else "something is missing, see above")
    return 0 if well else 4


def _report(module: str, package: str, optional: bool, write: Callable[[str], None]) -> bool:
    """Whether `module` imports, or need not."""
    remedy = f"python -m pip install --upgrade {package}"
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        write(f"{package}: {'not there (optional)' if optional else 'MISSING'}; {remedy}")
        return optional
    try:
        importlib.import_module(module)
    except Exception as error:  # a damaged package can fail in any way
        reason = " ".join(str(error).split())
        write(f"{package}: BROKEN ({type(error).__name__}: {reason}); {remedy}")
        return optional
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        version = "of unknown version"
    write(f"{package} {version}")
    return True


def _try_torch(write: Callable[[str], None]) -> bool:
    """Whether torch and torchvision work together."""
    import torch
    import torchvision

    try:
        boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
        torchvision.ops.nms(boxes, torch.ones(1), 0.5)
    except Exception as error:
        reason = " ".join(str(error).split())[:100]
        write(f"torch and torchvision do not fit together ({reason}); install both at once:")
        write("    python -m pip install --upgrade --force-reinstall torch torchvision")
        return False
    from dcdet.ops import compiled

    write(compiled.describe())
    if compiled.missing:
        write(f"    with a C++ compiler: {compiled.REBUILD}")
    elif compiled.missing_for_cuda and torch.cuda.is_available():
        write(f"    with nvcc: {compiled.REBUILD}")
    if not torch.cuda.is_available():
        built = torch.version.cuda
        write(f"no GPU in use (torch is built for {'CUDA ' + built if built else 'CPUs only'})")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        write(f"GPU {index}: {device.name}, {device.total_memory / 1e9:.0f} GB")
    return True
