"""What an object store, or the library that speaks to it, says when it refuses: in words that a user can act on.

S3 has one number for many troubles (403: no permission, a stale token, a clock that is off), so its code decides.
Libraries that are not installed here raise nothing, so nothing is imported for it.
"""

from __future__ import annotations

from typing import Any

_CODES = {
    ("NoSuchBucket",): ("there is no such bucket", "Make it, or check its name."),
    ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"): (
        "the credentials have expired",
        "Renew them, or name a profile or a role that is renewed by itself, and run again.",
    ),
    ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidClientTokenId", "InvalidSecurity"): (
        "the store does not know the credentials",
        "Check the profile or the variables that they come from, and that they are of this store.",
    ),
    ("RequestTimeTooSkewed",): ("the clock of this machine is off", "Set it, best by NTP, and run again."),
    (
        "PermanentRedirect",
        "TemporaryRedirect",
        "Redirect",
        "AuthorizationHeaderMalformed",
        "IllegalLocationConstraintException",
        "301",
        "307",
    ): ("the bucket is of another region or endpoint", "Set its region."),
    ("SlowDown", "ServiceUnavailable", "Throttling", "ThrottlingException", "TooManyRequests", "429", "503"): (
        "the store asks to come back later",
        "Wait, or send it less at a time, and run again.",
    ),
    ("InternalError", "500", "502", "504", "RequestTimeout"): ("the store is in trouble", "Run again later."),
    ("ConditionalRequestConflict", "OperationAborted", "409"): (
        "others write to the same place at the same time",
        "See that nothing else does, and run again.",
    ),
    ("AccessDenied", "AllAccessDisabled", "AccountProblem", "403"): (
        "the store does not permit it",
        "Give the credentials that are used the right to it, or use others.",
    ),
    ("XMinioStorageFull", "InsufficientStorage", "QuotaExceeded", "507"): (
        "there is no room left on the store",
        "Free some space there and run again.",
    ),
    ("PreconditionFailed", "412"): ("another process has written there", "See that nothing else does, and run again."),
    ("NotImplemented", "501"): ("the store cannot do it", "Choose a store that can."),
}
_KEY_OF_KMS = ("the key of KMS that encrypts the place may not be used", "Look after the key and its policy.")

_CLASSES = {
    "NoCredentialsError": ("no credentials are found on this machine", "Set up a profile, or give it a role."),
    "PartialCredentialsError": ("the credentials are not complete", "Check the profile that they come from."),
    "CredentialRetrievalError": ("no credentials can be had", "Check the profile or the role that they come from."),
    "TokenRetrievalError": ("no credentials can be had", "Log in anew."),
    "UnauthorizedSSOTokenError": ("the login has expired", "Log in anew."),
    "SSOTokenLoadError": ("there is no login", "Log in."),
    "ProfileNotFound": ("there is no such profile on this machine", "Check its name, or set it up here."),
    "NoRegionError": ("no region is set", "Set that of the bucket."),
    "SSLError": ("the store is not who it should be", "Check the endpoint and its certificate."),
}
_NO_ANSWER = ("the store does not answer", "Check the endpoint and the network, and run again.")
_PASSING = {
    *("SlowDown", "ServiceUnavailable", "Throttling", "ThrottlingException", "TooManyRequests", "InternalError"),
    *("RequestTimeout", "ConditionalRequestConflict", "OperationAborted", "409", "429", "500", "502", "503", "504"),
}
_OF_TRANSPORT = {
    *("ConnectionError", "HTTPClientError", "ClientPayloadError", "IncompleteRead", "ResponseParserError"),
    *("TimeoutError", "FSTimeoutError", "ClientConnectionError"),
}


def response_of(error: BaseException | None) -> dict[str, Any]:
    """What the store answered, of an error of botocore or of one that was made of it; nothing if there was none."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return response
        error = error.__cause__
    return {}


def code_of(error: BaseException | None) -> str:
    """The code that the store gave; empty if there was none."""
    return str(response_of(error).get("Error", {}).get("Code", ""))


def is_passing(error: BaseException) -> bool:
    """Whether another try may well succeed."""
    if code := code_of(error):
        status = response_of(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return code in _PASSING or status in (429, 500, 502, 503, 504)
    return not _OF_TRANSPORT.isdisjoint(_names(error)) and not {"SSLError"} & _names(error)


def in_words(error: BaseException) -> tuple[str, str] | None:
    """What is wrong, with what the store said itself, and what to do; None for everything that is no store's."""
    response = response_of(error)
    if said := response.get("Error"):
        code, message = str(said.get("Code", "")), str(said.get("Message", "")).strip()
        what = f"{code}: {message}" if message else code
        if code.startswith("KMS.") or (code == "AccessDenied" and "kms:" in message):
            told = _KEY_OF_KMS
        else:
            told = next((told for codes, told in _CODES.items() if code in codes), ("", ""))
        region = said.get("Region") or response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get(
            "x-amz-bucket-region"
        )
        if region and "region" in told[0]:
            told = (f"{told[0]}: '{region}'", told[1])
        return (f"{told[0]} ({what})", told[1]) if told[0] else None
    for name, told in _CLASSES.items():
        if name in _names(error):
            return f"{told[0]} ({error})", told[1]
    if not _OF_TRANSPORT.isdisjoint(_names(error)) and (text := str(error) or type(error).__name__):
        return f"{_NO_ANSWER[0]} ({text})", _NO_ANSWER[1]
    return None


def _names(error: BaseException | None) -> set[str]:
    names: set[str] = set()
    while error is not None:
        names.update(kind.__name__ for kind in type(error).__mro__)
        error = error.__cause__
    return names
