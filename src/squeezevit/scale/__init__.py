"""Millions of photographs through a bundle, on Ray Data: any number of machines, any store, a table of whole shards.

A source is cut into parts; each part becomes one shard of the table, and nothing else does. That is what makes a run repeatable: a
part whose shard is there is done, every other part is done again.
"""

from squeezevit.scale.job import Cluster, Outcome, embed, predict

__all__ = ["Cluster", "Outcome", "embed", "predict"]
