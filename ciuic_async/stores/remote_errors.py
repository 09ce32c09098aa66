"""What an object store's client says, as this package's errors.

The client's own message is never passed on: it holds the whole answer of the server, and some servers answer a wrong
signature with all that went into it. Kept are the status, the server's name for the mistake, and what helps.
"""

from __future__ import annotations

import re

from ciuic_async.errors import CiuicError, NotFoundError, StoreError

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([A-Za-z0-9]{1,60})</Code>")
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "bucket does not exist")
_NO_CREDENTIALS = (
    "169.254.169.254",
    "169.254.170.2",
    "metadata.google.internal",
    "MissingAccessKeyId",
    "MissingSecret",
)
_BAD_ANSWER = ("NotPartial", "UnexpectedRange", "NoContentRange", "ParseContentRange", "InvalidContentRange")
"""Something on the way cuts ranges, or leaves them out."""
_BROKEN_CONNECTION = ("kind: Connect", "kind: Timeout", "kind: Request", "kind: Body", "kind: Interrupted", "dns error")

_ADVICE = {
    "access_denied": "access denied: check the credentials (environment, profile, storage_options) and their rights",
    "no_credentials": "no credentials were found: set them in the environment, a profile or storage_options",
    "no_bucket": "the bucket does not exist: create it, or check its name and the endpoint",
    "wrong_region": "the bucket is in another region: set AWS_REGION or storage_options={'region': ...}",
    "throttled": "the store asks for fewer requests: try again later",
    "unreachable": "no answer: check the endpoint and the network",
    "bad_answer": "the answer is not the range that was asked for: does a proxy between here and the store change it?",
    "server_error": "the store failed inside: try again later",
    "not_supported": "the store cannot do this",
    "store": "check the bucket, the endpoint and the credentials",
}
_CODE_ADVICE = {
    "RequestTimeTooSkewed": "this machine's clock is wrong: set it",
    "ExpiredToken": "the credentials have expired: renew them",
    "SignatureDoesNotMatch": "the secret key does not fit the access key, or the region is another",
    "InvalidAccessKeyId": "the store does not know this access key",
}


def translate(error: BaseException, url: str, name: str) -> CiuicError:
    """The error for what the client raised about ``name`` (may be empty) at ``url``.

    Raise it outside of the ``except`` block, so that the client's own message does not travel along as its context.
    """
    text = str(error)
    place = f"{url}/{name}" if name else url
    kind = _kind(error, text)
    if kind == "no_file":
        return NotFoundError(f"{place}: no such object", kind="no_file", where=name)
    status, code = _STATUS.search(text), _CODE.search(text)
    said = " ".join(match[1] for match in (status, code) if match)
    advice = _CODE_ADVICE.get(code[1] if code else "", _ADVICE[kind])
    return StoreError(f"{place}: {advice}" + (f" ({said})" if said else ""), kind=kind, where=name or url)


def _kind(error: BaseException, text: str) -> str:
    match = _STATUS.search(text)
    status = int(match[1]) if match else 0
    if any(word in text for word in _NO_BUCKET):
        return "no_bucket"
    if any(word in text for word in _NO_CREDENTIALS):
        return "no_credentials"
    if isinstance(error, FileNotFoundError):
        return "no_file"
    if type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError") or status in (401, 403):
        return "access_denied"
    if status == 501 or type(error).__name__ == "NotSupportedError":
        return "not_supported"
    if status in (429, 503) or "SlowDown" in text:
        return "throttled"
    if status >= 500 or status == 408:
        return "server_error"
    if status in (301, 307) or "AuthorizationHeaderMalformed" in text:
        return "wrong_region"
    if any(word in text for word in _BAD_ANSWER):
        return "bad_answer"
    if any(word in text for word in _BROKEN_CONNECTION):
        return "unreachable"
    return "store"


def status_of(error: BaseException) -> int:
    """The HTTP status that an error of the client is about; 0: none."""
    match = _STATUS.search(str(error))
    return int(match[1]) if match else 0
