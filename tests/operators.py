"""What timm needs before it can be imported beside a CPU build of torch."""

import importlib.util
from pathlib import Path

import torch


def _torchvision_loads() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True
    try:
        for library in Path(spec.origin).parent.glob("_C*"):
            torch.ops.load_library(str(library))
    except OSError:
        return False
    return True


# timm imports torchvision, and one that was built for CUDA cannot be imported beside a CPU build of
# torch: its own library does not load, and then two operators are missing that no test calls.
# Declared without a kernel they are enough. They last as long as this object.
if not _torchvision_loads():
    _torchvision = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _torchvision.define(f"{_name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
