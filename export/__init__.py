"""Checkpoint in, proved artifact out: one file a target."""
