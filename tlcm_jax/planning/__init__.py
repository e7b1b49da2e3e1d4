"""What a recipe needs on hardware that is not here: compiled ahead of time, and added up."""
