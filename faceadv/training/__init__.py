"""Training: one loop, and a recipe for each network that ships."""
