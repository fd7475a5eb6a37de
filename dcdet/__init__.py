"""dcdet: deformable convolutional networks for object detection."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dcdet.config import load_config
    from dcdet.engine.checkpoint import load_weights
    from dcdet.models.build import build_model

__all__ = ["build_model", "load_config", "load_weights"]
__version__ = "0.1.0"

# Imported on first use, so that `import dcdet` and `dcdet --help` do not wait for torch.
_HOMES = {
    "build_model": "dcdet.models.build",
    "load_config": "dcdet.config",
    "load_weights": "dcdet.engine.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dcdet' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
