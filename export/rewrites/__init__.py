"""Rewrites of a network before its conversion: same outputs, graphs that devices compute faster."""
