"""Which encoder a user's word means."""

from __future__ import annotations

from ciuic_async.codecs.auto import AutoEncoder
from ciuic_async.codecs.base import ChunkEncoder
from ciuic_async.codecs.raw import RawCodec
from ciuic_async.codecs.smallest import SmallestEncoder
from ciuic_async.errors import UsageError
from ciuic_async.options import CODEC, WRITE, CodecOptions


def encoder_for(name: str, options: CodecOptions = CODEC, threads: int = WRITE.encode_threads) -> ChunkEncoder:
    """``"auto"`` (durable soonest), ``"smallest"`` (fewest bytes) or ``"raw"``; one for each training run.

    Args:
        name: the word.
        options: the tunables.
        threads: that will call ``encode`` at once; ``"auto"`` predicts by it.

    Raises:
        UsageError: kind ``unknown_codec``.
    """
    if name == "auto":
        return AutoEncoder(options, threads)
    if name == "smallest":
        return SmallestEncoder(options)
    if name == "raw":
        return RawCodec()
    raise UsageError(f'unknown codec {name!r}; expected "auto", "smallest" or "raw"', kind="unknown_codec")
