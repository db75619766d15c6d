"""Whether the Hub can be asked."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request

from huggingface_hub import constants


def hub_answers(timeout: float = 10.0) -> bool:
    """Whether the Hub may be asked and can be reached, tried once, where its own client would try again and again."""
    if constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=timeout).close()
    except urllib.error.HTTPError:
        return True
    except OSError as error:
        return isinstance(getattr(error, "reason", None), ssl.SSLError)  # the client has certificates of its own
    return True
