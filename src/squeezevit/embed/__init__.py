"""Photographs through a bundle: classes, or features, by whatever engine the bundle holds."""

from squeezevit.embed.engines import Engine, open_engine
from squeezevit.embed.job import Done, Settings, embed, predict

__all__ = ["Done", "Engine", "Settings", "embed", "open_engine", "predict"]
