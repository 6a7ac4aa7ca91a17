"""Writers of the record formats, by the formats' own documents and without this package's readers."""

import io
import json
import struct
import tarfile


def example(features: dict) -> bytes:
    """A serialised tf.train.Example; a value is bytes (or a list of them), or a list of integers."""

    def varint(number):
        out = b""
        while number > 127:
            out += bytes([number & 127 | 128])
            number >>= 7
        return out + bytes([number])

    def field(number, content):
        return varint(number << 3 | 2) + varint(len(content)) + content

    entries = b""
    for name, value in features.items():
        values = [value] if isinstance(value, bytes) else value
        if all(isinstance(one, bytes) for one in values):
            feature = field(1, b"".join(field(1, one) for one in values))
        else:
            feature = field(3, field(1, b"".join(varint(one) for one in values)))
        entries += field(1, field(1, name.encode()) + field(2, feature))
    return field(1, entries)


def masked(data: bytes) -> int:
    """Masked CRC32C (Castagnoli), bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def tfrecord(records) -> bytes:
    out = b""
    for data in records:
        length = struct.pack("<Q", len(data))
        out += length + struct.pack("<I", masked(length)) + data + struct.pack("<I", masked(data))
    return out


def tar(members) -> bytes:
    """members: (name, bytes)."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return raw.getvalue()


def write_array_record(path, records):
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:4")
    for data in records:
        writer.write(data)
    writer.close()
    return path


def payloads(texts):
    """The same texts in every form that a record may have, in turn."""
    forms = (
        lambda text: text.encode(),
        lambda text: json.dumps({"id": 7, "text": text}).encode(),
        lambda text: example({"id": [1, 300], "text": text.encode(), "url": b"x"}),
    )
    return [forms[number % 3](text) for number, text in enumerate(texts)]
