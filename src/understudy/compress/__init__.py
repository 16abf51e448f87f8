"""Smaller networks from trained ones: pruning and quantisation."""
