"""How robust a classifier is, and whether that number can be trusted: shards, checks, headline."""
