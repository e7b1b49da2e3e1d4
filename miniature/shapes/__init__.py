"""`shapes-xl`: a procedural text-to-image world in which right and wrong can be counted."""
