"""GGUF models in several files (llama.cpp's gguf-split), read as one.

The files are called NAME-00001-of-00003.gguf and so on; each says its number and how many there
are (split.no, split.count). The first has the metadata, each has some of the tensors. Any of them
may be named.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from pylora.errors import FileFormatError
from pylora.formats.gguf_header import GGUFHeader, GGUFTensor, read_header

_NAME = re.compile(r"^(.*)-(\d{5})-of-(\d{5})(\.gguf)$", re.DOTALL)
_MOST = 10_000  # files of one model


def read_gguf(path: Path) -> GGUFHeader:
    """The header of a GGUF file, or of the model that it is a part of.

    Raises FileFormatError naming a part that is missing, has another number than its name says, or
    has a tensor that another part has too; and where tensors are fewer than the model was split
    into.
    """
    header = read_header(path)
    count = header.metadata.get("split.count", 0)
    if count in (0, 1):
        return header
    name = _NAME.match(path.name)
    if name is None or int(name[3]) != count or not 1 < count <= _MOST:
        raise FileFormatError(
            f"{path}: this is one of {count} parts of a split model, so its name must end in "
            f"-NNNNN-of-{count:05d}.gguf for the others to be found; give it its name back"
        )
    files = [
        path.with_name(f"{name[1]}-{i:05d}-of-{name[3]}{name[4]}") for i in range(1, count + 1)
    ]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileFormatError(
            f"{path}: this is one of {count} parts of a split model, and {len(missing)} of them "
            f"are not beside it: {', '.join(missing[:3])}; download all of them into one directory"
        )
    parts = [header if file == path else read_header(file) for file in files]
    tensors: dict[str, GGUFTensor] = {}
    for i, (file, part) in enumerate(zip(files, parts)):
        said = part.metadata.get("split.no"), part.metadata.get("split.count")
        if said != (i, count):
            raise FileFormatError(
                f"{file}: its metadata say that it is part {said[0]} of {said[1]}, counted from 0, "
                f"but its name says {i} of {count}"
            )
        for tensor, place in part.tensors.items():
            if tensor in tensors:
                raise FileFormatError(
                    f"{file}: the tensor {tensor[:200]!r} is in another part, too"
                )
            tensors[tensor] = dataclasses.replace(place, part=i)
    total = parts[0].metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise FileFormatError(
            f"{files[0]}: the model was split with {total} tensors, but its {count} parts have "
            f"{len(tensors)}; they belong to different models"
        )
    return GGUFHeader(
        path,
        parts[0].data,
        parts[0].metadata,
        tensors,
        tuple(p.data for p in parts[1:]),
        parts[0].places,
    )
