"""A model on the Hugging Face Hub: its config.json and the headers of its safetensors files by ranged requests. Nothing is written to disk.

HF_ENDPOINT and HF_TOKEN mean what they mean to huggingface_hub, HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE too. The token goes to the endpoint's host alone,
never to where it redirects, and no message holds it.
"""

import http.client
import os
import re
import urllib.error
import urllib.parse
import urllib.request

from memory_budget.sources.safetensors import INDEX, WHOLE, Entry, shards_of, tensors_of

ENDPOINT = "https://huggingface.co"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]{1,100})?")
SECONDS = 20.0
LARGEST_FILE = 100_000_000  # bytes of config.json or an index
TRUE = ("1", "ON", "YES", "TRUE")


class HubModel:
    """`OWNER/NAME` or `OWNER/NAME@REVISION`. Raises ValueError, one line, wherever the Hub cannot be asked or has no answer."""

    def __init__(self, hub_id: str) -> None:
        if offline := next((name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name, "").upper() in TRUE), None):
            raise ValueError(f"{hub_id} is neither a folder nor a file here, and {offline} is set: the Hub is not asked; give a folder or a config.json")
        self.hub_id = hub_id
        name, _, revision = hub_id.partition("@")
        self.endpoint = (os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")
        host = urllib.parse.urlsplit(self.endpoint)
        if host.scheme not in ("http", "https") or not host.hostname:
            raise ValueError("HF_ENDPOINT must be an address that begins with http:// or https://")
        self.host = host.hostname
        self.base = f"{self.endpoint}/{name}/resolve/{urllib.parse.quote(revision or 'main', safe='')}/"
        self.token = (os.environ.get("HF_TOKEN") or "").strip()
        if not re.fullmatch(r"[!-~]*", self.token):
            raise ValueError("HF_TOKEN must be printable ASCII without spaces")
        self.opener = urllib.request.build_opener(_Redirects(self.token))

    def config(self) -> bytes:
        """The text of config.json."""
        content = self._read("config.json", 0, LARGEST_FILE, whole=True)
        if content is None:
            raise ValueError(f"{self.hub_id} has no config.json on {self.host}, or is not there; a private one needs HF_TOKEN")
        return content

    def tensors(self) -> dict[str, Entry]:
        """Shapes of the tensors; empty where there are no safetensors files."""
        if self._read(WHOLE, 0, 8) is not None:
            return tensors_of([WHOLE], self._part)
        index = self._read(INDEX, 0, LARGEST_FILE, whole=True)
        return tensors_of(shards_of(index), self._part) if index is not None else {}

    def _part(self, name: str, start: int, length: int) -> bytes:
        content = self._read(name, start, length)
        if content is None:
            raise ValueError(f"{self.hub_id}: {name} is listed in {INDEX} but is not on {self.host}")
        return content

    def _read(self, name: str, start: int, length: int, *, whole: bool = False) -> bytes | None:
        """So many bytes of a file from there on, at most; None where there is no such file. A server that ignores ranges is read no further than asked."""
        request = urllib.request.Request(self.base + urllib.parse.quote(name), headers={"User-Agent": "memory_budget"})
        if not whole:
            request.add_header("Range", f"bytes={start}-{start + length - 1}")
        if self.token:
            request.add_unredirected_header("Authorization", f"Bearer {self.token}")
        try:
            with self.opener.open(request, timeout=SECONDS) as response:
                skip = 0 if whole or response.status == 206 else start
                while skip > 0:
                    skip -= len(response.read(min(skip, 2**16))) or skip
                return response.read(length)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            if error.code in (401, 403):
                given = "HF_TOKEN does not give access to it" if self.token else "it needs HF_TOKEN (private or gated, or there is no such model)"
                raise ValueError(f"{self.hub_id}: {self.host} answers {error.code}: {given}") from None
            raise ValueError(f"{self.hub_id}: {self.host} answers {error.code} for {name}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None)
            why = getattr(reason, "strerror", None) or (type(error).__name__ if reason is None else type(reason).__name__)
            raise ValueError(f"{self.hub_id} is neither a folder nor a file here, and {self.host} cannot be reached ({why}); "
                             "give a folder or a config.json, or check the network and HF_ENDPOINT") from None  # fmt: skip


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect with the range, and with the token only where the host and scheme stay the same."""

    def __init__(self, token: str) -> None:
        self.token = token

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and self.token and _place(newurl) == _place(req.full_url):
            request.add_unredirected_header("Authorization", f"Bearer {self.token}")
        return request


def _place(url: str) -> tuple[str, str]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.netloc
