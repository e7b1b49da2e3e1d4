"""What a run shows to people: a self-contained report.html and contact sheets.

Everything here takes plain data (numpy images, numbers, text) and computes nothing about models.
"""
