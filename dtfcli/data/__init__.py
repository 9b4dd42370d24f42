"""Text → rows of tokens.

In: `data.sources` of the settings and a tokenizer. Out: `TokenizedData` (blocks on disk) or a `RowStream`.
The way: `sources` says what a reader offers, `files` and `hub` read, `documents` gives documents, `conversations` and
`tokenizer` encode them, `packing` splits and packs, `prepare` caches the blocks, `order` shuffles them; `mixture` and
`stream` do the same while training.
"""
