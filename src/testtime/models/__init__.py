"""Networks on which test-time adaptation is studied."""

from testtime.models.resnet import CifarResNet, Normalize, ResNetGN, rotation_head

__all__ = ["CifarResNet", "Normalize", "ResNetGN", "rotation_head"]
