"""The benchmark: one cell, the grid of all cells, and what their rows say."""
