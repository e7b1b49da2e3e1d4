"""What a model's images are worth: protocols, scorers, reports."""
