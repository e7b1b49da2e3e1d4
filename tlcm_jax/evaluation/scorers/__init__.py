"""Scorers and statistics, one interface for losses and for evaluation."""
