"""Small reference networks of the papers. Every name here is a function that builds one."""

from secateur.zoo.lenet import lenet5
from secateur.zoo.resnet import resnet8, resnet20, resnet56

__all__ = ["lenet5", "resnet8", "resnet20", "resnet56"]
