"""How robust a classifier is, and whether that number can be trusted.

measures: what is computed on one shard of images. work: which process computes which shard. checks: what must hold
before an accuracy is a headline. evaluate: table, summary, verdict and pictures of all shards. table: the files.
"""
