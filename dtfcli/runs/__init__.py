"""A run folder: its layout, for everybody who reads or writes one.

`folder` owns the names of its files and finds, makes and locks runs; `files` writes whole files or none;
`public` gives a run's settings without traces of this machine.
"""
