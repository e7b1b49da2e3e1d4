"""Damaged and hostile inputs: how they are made, who reads them, and what is watched."""
