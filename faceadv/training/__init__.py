"""Training: one loop, and one recipe for each network that ships."""

__all__ = ["RECIPES"]

RECIPES = ("resgn", "puface", "a3gn", "prior")
