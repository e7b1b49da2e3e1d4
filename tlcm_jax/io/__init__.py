"""Weights in and out: diffusers folders, single files, LoRA dialects. Reads and writes."""
