"""Readers of files that others wrote: one module per format, each gives an `ImageSource`.

Nothing in a file is executed, and sizes are checked before memory is allocated. A reader of a published data set has
`find(name, path)`, which gives the folder of its files or None, and `read(name, folder)`; names are those of
`data_sets.DATA_SETS`.
"""
