"""Training: settings → a run folder with a final model.

In: settings, or a run folder to go on with. Out: a `TrainResult`, and a `TrainEvent` for each thing that happens.
Read in this order: `plan` (sizes of the run), `setup` (everything a run needs, built once), `loop` (drives), `step`
(one optimizer step), `objectives` (the loss), `calibrate` (thresholds), `checkpoint` (stop and go on).
Benchmarks and publishing come after training, in `dtfcli.experiment`.
"""
