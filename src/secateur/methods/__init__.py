"""Methods: ways to train a network into its constraint sets, one paper a file."""

from secateur.methods.admm import ADMM
from secateur.methods.base import METHODS, Method, MethodOptions, Phase
from secateur.methods.djpq import DJPQ
from secateur.methods.frozen import FrozenAdam
from secateur.methods.gmp import GMP
from secateur.methods.post_training import PostTraining
from secateur.methods.srste import SRSTE

__all__ = [
    "ADMM",
    "DJPQ",
    "GMP",
    "METHODS",
    "SRSTE",
    "FrozenAdam",
    "Method",
    "MethodOptions",
    "Phase",
    "PostTraining",
]
