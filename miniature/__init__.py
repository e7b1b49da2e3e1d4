"""The embedded world: captioned emoji, and what trains and judges a small teacher on them."""
