"""Core ML bundles computed in numpy on any machine: the proof of an export where Core ML is not."""
