"""Adversarial faces: a small helper package for the notebooks of this course.

What notebooks import lies flat in this folder, one module for each subject: ``from faceadv import attacks, purifiers``.
Everything else lies in rooms: ``networks``, ``training``, ``benchmark``, ``course`` and ``store``.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
