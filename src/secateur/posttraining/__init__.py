"""Compression without training, from a few hundred inputs.

fits = reconstruct(model, batches, sets.NM(2, 4))      # layer by layer, in place
"""

from secateur.posttraining.sequence import Fit, reconstruct

__all__ = ["Fit", "reconstruct"]
