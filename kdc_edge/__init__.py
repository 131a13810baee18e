"""Distil a Stable Diffusion student, export it with proof, run it on the device without PyTorch."""

__version__ = "0.1.0"
