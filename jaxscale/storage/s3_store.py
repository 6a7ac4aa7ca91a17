"""An S3 bucket, or one of the many servers that speak S3: through botocore, one request for one call.

botocore's own retries are off: how long a call may take, and whether it is repeated, is decided in one place for all
stores (`guarded.py`). Conditional writes are S3's own, `If-None-Match: *` and `If-Match: ETag`. Where the server is and
whose keys are used comes from the environment or ~/.aws, as for every tool of S3 (AWS_ENDPOINT_URL, AWS_PROFILE, ...).
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable, Iterator
from typing import Any

from jaxscale.storage.store import PART_BYTES, Chunks, Conflict, StoreError, Versioned

CONNECT_SECONDS, READ_SECONDS = 5, 20
MISSING, LOST = (404,), (409, 412)
PARTS = 9000
COPY_BYTES = 5 * 10**9
"""What one request of S3 copies at most."""
"""S3 allows 10 000 parts of a file."""


class S3Error(OSError):
    """What S3 answered; `code` is HTTP's, by which retries are decided."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class S3Unreachable(OSError):
    """No answer, or one that ended too early. Another attempt may go better."""


class S3Store:
    """`s3://bucket/prefix`. Raises StoreError where botocore is not installed or the address is none."""

    def __init__(self, address: str) -> None:
        bucket, _, prefix = address.removeprefix("s3://").partition("/")
        if not bucket:
            raise StoreError(f"{address} names no bucket; an address of S3 is s3://bucket/prefix")
        self.address = address.rstrip("/")
        self._bucket, self._prefix = bucket, prefix.strip("/")
        self._client = _client(address)

    def names(self, folder: str = "") -> list[str]:
        found = set()
        prefix = self._key(folder) + "/" if folder or self._prefix else ""
        for page in self._pages(prefix, Delimiter="/"):
            found |= {one["Prefix"][len(prefix) :].rstrip("/") for one in page.get("CommonPrefixes", ())}
            found |= {one["Key"][len(prefix) :] for one in page.get("Contents", ())}
        return sorted(found - {""})

    def files(self, folder: str = "") -> dict[str, int]:
        prefix = self._key(folder) + "/" if folder or self._prefix else ""
        pages = self._pages(prefix)
        return {one["Key"][len(prefix) :]: int(one["Size"]) for page in pages for one in page.get("Contents", ())}

    def size(self, name: str) -> int:
        return int(self._ask("head_object", Key=self._key(name))["ContentLength"])

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        if size == 0:
            return b""
        part = (
            {}
            if start == 0 and size is None
            else {"Range": f"bytes={start}-{'' if size is None else start + size - 1}"}
        )
        try:
            return self._body(self._ask("get_object", Key=self._key(name), **part))
        except S3Error as error:
            if error.code == 416:  # nothing lies there: the file ends before
                return b""
            raise

    def read_versioned(self, name: str) -> Versioned:
        answer = self._ask("get_object", Key=self._key(name))
        return Versioned(self._body(answer), answer["ETag"])

    def write(self, name: str, data: bytes) -> None:
        self._ask("put_object", Key=self._key(name), Body=data)

    def write_chunks(self, name: str, chunks: Chunks, size: int) -> None:
        if size <= PART_BYTES:
            self.write(name, b"".join(chunks()))
            return
        key = self._key(name)
        upload = self._ask("create_multipart_upload", Key=key)["UploadId"]
        try:
            parts = []
            for number, part in enumerate(_joined(chunks(), max(PART_BYTES, -(-size // PARTS))), 1):
                sent = self._ask("upload_part", Key=key, UploadId=upload, PartNumber=number, Body=part)
                parts.append({"ETag": sent["ETag"], "PartNumber": number})
            self._ask("complete_multipart_upload", Key=key, UploadId=upload, MultipartUpload={"Parts": parts})
        except BaseException:
            with contextlib.suppress(Exception):  # what is left of it costs money; a rule of the bucket can delete it
                self._ask("abort_multipart_upload", Key=key, UploadId=upload)
            raise

    def copy(self, name: str, to: str, size: int) -> bool:
        try:
            if size > COPY_BYTES or self.size(name) != size:
                return False
            self._ask("copy_object", Key=self._key(to), CopySource={"Bucket": self._bucket, "Key": self._key(name)})
        except FileNotFoundError:
            return False
        return True

    def create(self, name: str, data: bytes) -> str:
        return self._put_if(name, data, IfNoneMatch="*")

    def replace(self, name: str, data: bytes, version: str) -> str:
        try:
            return self._put_if(name, data, IfMatch=version)
        except FileNotFoundError:
            raise Conflict(f"{self.address}/{name} is gone") from None

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._ask("delete_object", Key=self._key(name))

    def _put_if(self, name: str, data: bytes, **condition: str) -> str:
        try:
            return str(self._ask("put_object", Key=self._key(name), Body=data, **condition)["ETag"])
        except S3Error as error:
            if error.code in LOST:
                raise Conflict(f"{self.address}/{name} was written by somebody else") from error
            raise

    def _key(self, name: str) -> str:
        return "/".join(part for part in (self._prefix, name) if part)

    def _pages(self, prefix: str, **more: str) -> Iterator[dict[str, Any]]:
        token: dict[str, str] = {}
        while True:
            page = self._ask("list_objects_v2", Prefix=prefix, **more, **token)
            yield page
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        with _translated(f"{self.address} ({what})"):
            answer: dict[str, Any] = getattr(self._client, what)(Bucket=self._bucket, **arguments)
        return answer

    def _body(self, answer: dict[str, Any]) -> bytes:
        with _translated(self.address):
            data: bytes = answer["Body"].read()
        if len(data) != answer["ContentLength"]:
            raise S3Unreachable(f"{self.address} sent {len(data)} bytes of {answer['ContentLength']}")
        return data


def _client(address: str) -> Any:
    try:
        session = importlib.import_module("botocore.session")
        config = importlib.import_module("botocore.config")
    except ImportError:
        raise StoreError(f"{address} needs a package more: pip install 'jaxscale[s3]'") from None
    options = config.Config(
        connect_timeout=CONNECT_SECONDS, read_timeout=READ_SECONDS, retries={"total_max_attempts": 1}
    )
    try:
        return session.get_session().create_client("s3", config=options)
    except Exception as error:  # no region, a profile that is not there, a broken file of settings
        raise StoreError(f"{address} cannot be used: {error}; see the settings of AWS in the environment") from error


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """botocore's exceptions as those that a Store raises."""
    exceptions = importlib.import_module("botocore.exceptions")
    http = importlib.import_module("urllib3.exceptions")
    try:
        yield
    except exceptions.ClientError as error:
        code = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        text = f"{what}: {code} {error.response.get('Error', {}).get('Code', '')}: {error}"
        if code in MISSING and "NoSuchBucket" not in str(error):
            raise FileNotFoundError(text) from error
        raise S3Error(code, text) from error
    except exceptions.NoCredentialsError as error:
        raise S3Error(401, f"{what}: {error}") from error
    except (exceptions.BotoCoreError, http.HTTPError) as error:
        raise S3Unreachable(f"{what}: {type(error).__name__}: {error}") from error


def _joined(chunks: Iterable[bytes], size: int) -> Iterator[bytes]:
    """The same bytes in pieces of `size`, the last one as long as it is."""
    rest = bytearray()
    for chunk in chunks:
        rest += chunk
        while len(rest) >= size:
            yield bytes(rest[:size])
            del rest[:size]
    if rest:
        yield bytes(rest)
