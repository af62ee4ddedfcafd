"""What a network costs: parameters, MACs, BOPs and bytes, and bits under each encoding."""

from secateur.cost.account import FULL_BITS, Cost, LayerCost, bits_by_layer, inspect
from secateur.cost.breakeven import break_even, index_bits, measured_index_bits
from secateur.cost.encodings import ENCODINGS, Encoding
from secateur.cost.storage import Bound, LayerStorage, StorageTable, bound, storage_table

__all__ = [
    "ENCODINGS",
    "FULL_BITS",
    "Bound",
    "Cost",
    "Encoding",
    "LayerCost",
    "LayerStorage",
    "StorageTable",
    "bits_by_layer",
    "bound",
    "break_even",
    "index_bits",
    "inspect",
    "measured_index_bits",
    "storage_table",
]
