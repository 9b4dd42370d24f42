"""What routed models do with text: token by token, and in sums over a corpus; as tables, page and picture.

Read in this order: `tokens` (text → tokens with their places), `scores` (the meaning of each kind of score), `text`
(one text through a model), `oracle`, `statistics` (sums over any number of texts), `corpus`; then `tables`, `page` and
`figure`, which show. `sensitivity` leaves out layers.
"""
