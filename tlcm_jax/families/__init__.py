"""What a model family is: its networks, weights and files behind one protocol."""
