"""Small reference networks of the papers. Every name here is a function that builds one."""

from secateur.zoo.lenet import lenet5, lenet5_wide
from secateur.zoo.mobilenet import mobilenet_v2
from secateur.zoo.resnet import resnet8, resnet20, resnet56
from secateur.zoo.vgg import vgg7
from secateur.zoo.vit import vit_tiny

__all__ = [
    "lenet5",
    "lenet5_wide",
    "mobilenet_v2",
    "resnet8",
    "resnet20",
    "resnet56",
    "vgg7",
    "vit_tiny",
]
