"""What the method's parts, other recipes and our own changes are worth, in the world of shapes.

    python -m benchmarks.results --output docs/results.md --workdir runs/results

A table is a file of experiments (`ablation.py`, `recipes.py`, `improvements.py`); an experiment is
a recipe of `configs/`, changes to it, and how its stages share the UNet evaluations that all runs
have alike (`budget.py`). Each run, an experiment under one seed, is a process of its own
(`job.py`, `queue.py`) and leaves its scores in a folder; the page is written from these folders
alone (`page.py`, `sheets.py`).
"""
