"""Which codec a user's word means."""

from __future__ import annotations

from ciuic_async.codecs.base import Codec
from ciuic_async.codecs.planes import PlanesCodec
from ciuic_async.codecs.raw import RawCodec
from ciuic_async.errors import UsageError
from ciuic_async.options import CODEC, CodecOptions


def codec_for(name: str, options: CodecOptions = CODEC) -> Codec:
    """``"auto"`` (byte planes where a probe pays, else raw) or ``"raw"``.

    Raises:
        UsageError: kind ``not_available`` for ``"smallest"``, else ``unknown_codec``.
    """
    if name == "auto":
        return PlanesCodec(options)
    if name == "raw":
        return RawCodec()
    if name == "smallest":
        raise UsageError('codec="smallest" is not available in this version; use "auto" or "raw"', kind="not_available")
    raise UsageError(f'unknown codec {name!r}; expected "auto", "smallest" or "raw"', kind="unknown_codec")
