"""Initial weights of new layers."""

from torch import nn


def init_layers(*layers: nn.Module, std: float | None) -> None:
    """Weights from a normal distribution of this deviation, biases 0; all 0 for `std` 0.

    For `std` None weights are uniform as in Glorot and Bengio (Xavier). Source: init_weight of the
    2017 release: 0.01 for new layers, 0 for those of offsets.
    """
    for layer in layers:
        for parameter in layer.parameters(recurse=False):
            if parameter.dim() > 1 and std is None:
                nn.init.xavier_uniform_(parameter)
            elif parameter.dim() > 1 and std:
                nn.init.normal_(parameter, std=std)
            else:
                nn.init.zeros_(parameter)
