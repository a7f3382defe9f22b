"""What the words of a command line stand for, and how they are shown: files, networks, cameras, pipes."""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from ..data.images import IMAGE_SUFFIXES
from ..errors import InputError

Kind = Literal["pipe", "url", "camera", "null", "images", "folder", "video"]

NETWORK = ("http", "https", "rtmp", "rtmps", "rtp", "rtsp", "rtsps", "tcp", "udp")
# What a network source may open in its turn (playlists do): nothing on this machine, so no file, concat or subfile.
WHITELIST = ",".join((*NETWORK, "tls", "httpproxy", "crypto", "data"))
VIDEO_SUFFIXES = frozenset(
    (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".ts", ".m2ts", ".mpg", ".mpeg", ".flv", ".y4m", ".wmv", ".3gp")
)
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
    """pipe, url, camera, images (a file, or a folder or pattern of them) or video."""
    path = Path(address)
    if address == "-":
        return "pipe"
    if is_url(address):
        return "url"
    if re.fullmatch(r"/dev/video\d+", address):
        return "camera"
    if path.is_dir():
        return "images"
    if glob.has_magic(address) and not path.exists():
        suffixes = {Path(found).suffix.lower() for found in glob.glob(address, recursive=True)}
        return "video" if suffixes & VIDEO_SUFFIXES and not suffixes & IMAGE_SUFFIXES else "images"
    return "images" if path.suffix.lower() in IMAGE_SUFFIXES or not path.exists() else "video"


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
    return any(source_kind(s) != "images" for s in sources) or sink_kind(sink) not in ("folder", "images")


def stem(address: str) -> str:
    """The name that what is made of a source gets in a folder."""
    if address == "-":
        return "stdin"
    if _URL.match(address):
        parts = urlsplit(address)
        return re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{parts.hostname}{Path(parts.path).with_suffix('')}").strip("-.")
    return Path(address).stem
