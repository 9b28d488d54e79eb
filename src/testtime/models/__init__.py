"""Networks on which test-time adaptation is studied, and networks that learn as they read."""

from testtime.models.flops import count_flops
from testtime.models.resnet import CifarResNet, Normalize, ResNetGN, rotation_head
from testtime.models.vit import ViT
from testtime.models.vit3 import HViT3, ViT3

__all__ = [
    "CifarResNet",
    "HViT3",
    "Normalize",
    "ResNetGN",
    "ViT",
    "ViT3",
    "count_flops",
    "rotation_head",
]
