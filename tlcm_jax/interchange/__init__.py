"""Weights in and out: diffusers folders, LoRA dialects. Reads and writes; computes nothing."""
