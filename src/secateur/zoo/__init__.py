"""Small reference networks of the papers. Every name here is a function that builds one."""

from secateur.zoo.lenet import lenet5

__all__ = ["lenet5"]
