"""Methods: ways to train a network into its constraint sets, one paper a file."""

from secateur.methods.admm import ADMM
from secateur.methods.base import METHODS, Method, MethodOptions, Phase

__all__ = ["ADMM", "METHODS", "Method", "MethodOptions", "Phase"]
