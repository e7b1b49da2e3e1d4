"""Weights in and out: diffusers folders, single files, LoRA dialects. Reads and writes."""

from tlcm_jax.interchange.diffusers_folder import load_pipeline

__all__ = ["load_pipeline"]
