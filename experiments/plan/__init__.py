"""`alignlab plan`: what a recipe costs before GPU hours are spent (docs/scale.md).

One training is planned by `alignlab.plan`; here are what a recipe trains (`recipe_runs.py`), the
sums of it (`comparison.py`), what to change where it does not fit (`fits.py`), and how it is shown
(`table.py`; of all shipped recipes `page.py`).
"""
