"""Studies: the same experiment at every point of a grid, on equal terms, with error bars.

In: a preset, the axes of the grid, seeds; or runs that exist. Out: a `StudyReport`.
Read in this order: `grid` (which runs), `execute` (trains what is missing), `measure` (their losses and routing),
`differences` (with their intervals), `report` (all of it as data); then `figure` and `write`.
"""
