"""`alignlab plan`: what a run or a comparison costs before GPU hours are spent (docs/scale.md).

One run is planned by `alignlab.plan`; here are a comparison's sums (`comparison.py`), what to
change where it does not fit (`fits.py`), and how it is shown (`table.py`; of all shipped recipes
`page.py`).
"""
