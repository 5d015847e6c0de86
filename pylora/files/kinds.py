"""What a file is, told by its first bytes, for errors about a file of the wrong kind.

Only the beginning is read, and only words come of it: nothing is decided by them. What a name
ends in does not count, as it is often the name that is wrong.
"""

from __future__ import annotations

import os
from pathlib import Path

_HEAD = 4096
_PICKLE = "loading it runs code that its author wrote, so pylora does not read it"
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"GGUF", "a GGUF file, such as base models come in"),
    (b"lmgg", "a file of llama.cpp from before GGUF; convert the model again"),
    (b"tjgg", "a file of llama.cpp from before GGUF; convert the model again"),
    (
        b"version https://git-lfs",
        "a Git LFS pointer: the file itself was not downloaded; run `git lfs pull` in its folder",
    ),
    (b"PAR1", "a parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1f\x8b", "packed with gzip; unpack it"),
    (b"BZh", "packed with bzip2; unpack it"),
    (b"\xfd7zXZ", "packed with xz; unpack it"),
    (b"\x28\xb5\x2f\xfd", "packed with zstd; unpack it"),
    (b"7z\xbc\xaf", "a 7-Zip archive; unpack it"),
    (b"Rar!", "a RAR archive; unpack it"),
    (b"%PDF", "a PDF document"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"\x7fELF", "a program"),
    (b"SQLite format 3", "an SQLite database"),
)


def what_is(path: str | os.PathLike[str]) -> str:
    """A few words such as "a GGUF file, such as base models come in"; "" where nothing is known."""
    where = Path(path)
    try:
        if where.is_dir():
            return "a folder"
        if not where.is_file():
            return ""
        with open(where, "rb") as file:
            head = file.read(_HEAD)
    except (OSError, ValueError):
        return ""
    return _of(head)


def hint(path: str | os.PathLike[str], but: str = "") -> str:
    """ "; it is a GGUF file, such as base models come in", or "" where nothing better is known than
    `but`, the beginning of what is expected there."""
    what = what_is(path)
    return f"; it is {what}" if what and not (but and what.startswith(but)) else ""


def _of(head: bytes) -> str:
    return of_binary(head) or _of_text(head)


def of_binary(head: bytes) -> str:
    """What a file is that begins with `head`, in a few words; "" for text and where none knows."""
    if not head:
        return "empty"
    for magic, what in _MAGIC:
        if head.startswith(magic):
            return what
    if head.startswith(b"PK\x03\x04"):
        if b"data.pkl" in head:
            return f"a pickle of PyTorch; {_PICKLE}: convert it to safetensors"
        return "a zip archive; unpack it"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return f"a pickle (as .bin, .pt and .pth files are); {_PICKLE}: convert it to safetensors"
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < 1 << 32:
        lora = b".lora_A." in head or b".lora_B." in head
        return f"a safetensors file{' with the weights of an adapter' if lora else ''}"
    if not head.strip(b"\0"):
        return "nothing but zeros at its beginning; the download was not finished"
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it"
    return ""


def _of_text(head: bytes) -> str:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    low = start[:64].lower()
    if low.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return (
            "a web page: the download gave a page about the file, not the file; on a hub, take "
            "the address with /resolve/ in place of /blob/"
        )
    if start.startswith(b"["):
        return "a JSON array" if _printable(head) else ""
    if not start.startswith(b"{"):
        return ""
    for field, what in (
        (b'"peft_type"', "the settings of an adapter (adapter_config.json)"),
        (b'"added_tokens"', "a tokenizer (tokenizer.json)"),
        (b'"tokenizer_class"', "settings of a tokenizer (tokenizer_config.json)"),
        (b'"weight_map"', "an index of weights (model.safetensors.index.json)"),
        (b'"architectures"', "the configuration of a model (config.json)"),
        (b'"model_type"', "the configuration of a model (config.json)"),
        (b'"completion"', "records to train on"),
        (b'"messages"', "records to train on"),
    ):
        if field in head:
            return what
    return "JSON" if _printable(head) else ""


def _printable(head: bytes) -> bool:
    return b"\0" not in head
