"""Networks on which test-time adaptation is studied."""

from testtime.models.resnet import CifarResNet, Normalize, ResNetGN

__all__ = ["CifarResNet", "Normalize", "ResNetGN"]
