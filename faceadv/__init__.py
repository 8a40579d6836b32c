"""Adversarial faces: a small helper package for the notebooks of this course."""

__version__ = "0.1.0"
