"""Small nets trained here: the replicas of the transfer curves, and models of text and of chains of hops."""

from lab import at_first_use

__getattr__ = at_first_use(__name__, "k_hop", "language", "replicas")
