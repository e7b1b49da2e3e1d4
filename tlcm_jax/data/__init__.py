"""Prompts and datasets."""
