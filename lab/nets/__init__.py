"""Small nets trained here: the replicas of the transfer curves, and models of text and of chains of hops."""
