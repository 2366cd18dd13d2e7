"""The source inside a script that unpacks itself."""

from __future__ import annotations

import base64
import bz2
import zlib

import pytest
from make_scripts import pack

from orchestrator.packed_source import unpack

SOURCE = "import os\nprint(os.environ['SEED'])\n"


def of_zlib(text: str) -> str:
    packed = base64.b64encode(zlib.compress(text.encode())).decode()
    return f"import zlib,base64;exec(zlib.decompress(base64.b64decode('{packed}')))"


def of_parts(text: str) -> str:
    packed = base64.a85encode(bz2.compress(text.encode())).decode().replace("\\", "\\\\").replace('"', '\\"')
    return (
        f'from bz2 import decompress as d\nfrom base64 import a85decode\nblob = "{packed}" + ""\nraw = d(a85decode(blob))\n'
        "exec(compile(raw.decode('utf-8'), 'train', 'exec'), globals())\n"
    )


def of_imports(text: str) -> str:
    return f"exec(__import__('zlib').decompress({zlib.compress(text.encode())!r}))"


@pytest.mark.parametrize("packer", [pack, of_zlib, of_parts, of_imports])
def test_a_script_that_unpacks_itself_is_read_without_being_run(packer) -> None:
    assert unpack(packer(SOURCE)) == (SOURCE, True)


def test_what_is_packed_twice_is_unpacked_twice() -> None:
    assert unpack(pack(of_zlib(SOURCE))) == (SOURCE, True)


def test_a_plain_script_is_its_own_source() -> None:
    assert unpack(SOURCE) == (SOURCE, True)


@pytest.mark.parametrize(
    "text",
    [
        "exec(open('other.py').read())",
        "import urllib.request as u\nexec(u.urlopen('http://localhost').read())",
        "exec(input())",
        "import zlib\nexec(zlib.decompress(b'no zlib at all'))",
        "import os\nexec(os.popen('echo 1').read())",
    ],
)
def test_what_is_not_decoders_and_constants_alone_stays_unclear(text: str) -> None:
    assert unpack(text) == (text, False)


def test_nothing_of_a_script_is_run(tmp_path) -> None:
    mark = tmp_path / "ran"
    unpack(f"open({str(mark)!r}, 'w')\nexec(__import__('os').system('touch {mark}'))")
    assert not mark.exists()
