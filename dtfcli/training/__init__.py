"""Training: settings → a run folder with a final model.

In: settings, or a run folder to go on with. Out: a `TrainResult`, and an `TrainEvent` for whatever happens.
Read in this order: `plan` (sizes of the run), `setup` (everything a run needs, built once), `loop` (drives), `step`
(one optimizer step), `objectives` (the loss), `calibrate` (thresholds), `checkpoint` (stop and go on).
What follows training, benchmarks and publishing, is `dtfcli.experiment`'s.
"""
