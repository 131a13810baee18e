"""Checkpoint to Core ML."""
