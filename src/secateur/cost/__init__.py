"""What a network costs: parameters, MACs, BOPs and bytes."""

from secateur.cost.account import Cost, LayerCost, inspect

__all__ = ["Cost", "LayerCost", "inspect"]
