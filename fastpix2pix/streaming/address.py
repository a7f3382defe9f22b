"""What the words of a command line stand for, and how they are shown: files, networks, cameras, pipes."""

from __future__ import annotations

import glob
import os
import re
from itertools import takewhile
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from PIL import Image

from ..data.images import IMAGE_SUFFIXES
from ..errors import InputError

Kind = Literal["pipe", "url", "camera", "null", "images", "folder", "video"]

NETWORK = ("http", "https", "rtmp", "rtmps", "rtp", "rtsp", "rtsps", "tcp", "udp")
# What a network source may open in its turn (playlists do): nothing on this machine, so no file, concat or subfile.
WHITELIST = ",".join((*NETWORK, "tls", "httpproxy", "crypto", "data"))
VIDEO_SUFFIXES = frozenset(
    (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".ts", ".m2ts", ".mpg", ".mpeg", ".flv", ".y4m", ".wmv", ".3gp")
)
_RAW_JPEG = frozenset((".mjpeg", ".mjpg"))  # videos that begin as a JPEG does
_FILMS = ("MPEG", "FLI")  # videos that Pillow knows
_HEIF = b"mif1"  # the brand of AVIF and HEIC, which are MP4 to FFmpeg, in the first bytes
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def shown(address: str | Path) -> str:
    """An address as it may be printed: the password of a URL is ***."""
    text = str(address)
    if not _URL.match(text):
        return text
    scheme, rest = text.split("://", 1)
    authority, slash, path = rest.partition("/")
    user, at, host = authority.rpartition("@")
    name, colon, _ = user.partition(":")
    return f"{scheme}://{name}{colon}{'***' if colon else ''}{at}{host}{slash}{path}"


def is_url(address: str) -> bool:
    """Whether an address is of a network; refuses schemes that are not one of NETWORK."""
    if not _URL.match(address):
        return False
    scheme = urlsplit(address).scheme.lower()
    if scheme not in NETWORK:
        why = "; PyAV's FFmpeg has no SRT: receive it with another program and pipe it in as -"
        allowed = ", ".join(f"{name}://" for name in NETWORK)
        raise InputError(f"{shown(address)}: allowed are {allowed}{why if scheme == 'srt' else ''}")
    return True


def source_kind(address: str) -> Kind:
    """pipe, url, camera, images (a file, or a folder or pattern of them) or video.

    Refuses an image of another kind, which FFmpeg would show as a video of one picture.
    """
    path = Path(address)
    if address == "-":
        return "pipe"
    if is_url(address):
        return "url"
    if re.fullmatch(r"/dev/video\d+", address):
        return "camera"
    if path.is_dir():
        return "images"
    if _is_pattern(address):
        suffixes = {Path(found).suffix.lower() for found in glob.glob(address, recursive=True)}
        return "video" if suffixes & VIDEO_SUFFIXES and not suffixes & IMAGE_SUFFIXES else "images"
    if path.suffix.lower() in IMAGE_SUFFIXES or not path.exists():
        return "images"
    if path.is_file() and path.suffix.lower() not in VIDEO_SUFFIXES | _RAW_JPEG and _holds_image(path):
        allowed = ", ".join(sorted(IMAGE_SUFFIXES))
        raise InputError(f"{address}: not an image file that can be read here; allowed are {allowed}")
    return "video"


def _is_pattern(address: str) -> bool:
    return glob.has_magic(address) and not Path(address).exists()


def _holds_image(path: Path) -> bool:
    """Whether a file is an image by its first bytes."""
    try:
        with path.open("rb") as file:
            if _HEIF in file.read(64):
                return True
        with Image.open(path) as image:
            return image.format not in _FILMS
    except Exception:  # Pillow raises nearly every type there is; what the file is then, FFmpeg says
        return False


def expanded(address: str) -> list[str]:
    """The files of a pattern of videos; any other source as it is."""
    if source_kind(address) != "video" or Path(address).exists():
        return [address]
    return sorted(found for found in glob.glob(address, recursive=True) if Path(found).suffix.lower() in VIDEO_SUFFIXES)


def sink_kind(address: str) -> Kind:
    """pipe, url, null, folder, images (one file) or video (one file)."""
    path = Path(address)
    if address == "-":
        return "pipe"
    if address == "null:":
        return "null"
    if is_url(address):
        return "url"
    if path.is_dir() or address.endswith("/") or not path.suffix:
        return "folder"
    return "images" if path.suffix.lower() in IMAGE_SUFFIXES - {".gif"} else "video"


def is_video(sources: list[str], sink: str) -> bool:
    """Whether this is work for stream.translate, rather than for images one by one."""
    if any(source_kind(source) != "images" for source in sources):
        return True
    kind = sink_kind(sink)
    if kind == "video" and Path(sink).suffix.lower() not in VIDEO_SUFFIXES:  # a refusal, of a video or of an image
        return not all(Path(source).is_file() for source in sources)
    return kind not in ("folder", "images")


def stem(address: str) -> str:
    """The name that what is made of a source gets in a folder."""
    if address == "-":
        return "stdin"
    if _URL.match(address):
        parts = urlsplit(address)
        return re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{parts.hostname}{Path(parts.path).with_suffix('')}").strip("-.")
    path = Path(address)
    if _is_pattern(address):  # its folder's
        path = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
    path = Path(os.path.abspath(path))  # "." has no name
    return path.name if path.is_dir() else path.stem
