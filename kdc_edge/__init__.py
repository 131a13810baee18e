"""Distil a Stable Diffusion student, export it with proof, run it on the device without PyTorch."""

from kdc_edge.telemetry import switch_off

__version__ = "0.1.0"

switch_off()
