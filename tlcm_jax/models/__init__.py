"""Flax networks: UNet, VAE, CLIP towers and adapters. No noise levels, no losses."""
