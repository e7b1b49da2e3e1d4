"""The objectives, one file a term, and the table of stages that composes them."""
