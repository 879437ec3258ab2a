"""Where generated source lives: real files, so that a traceback, a profiler and a person can read them.

The directory is `REFOCUS_CACHE`, or `refocus` in the user's cache directory. It is created with mode 0700; where it
cannot be written, or belongs to someone else, a temporary directory of this process takes its place. A file is
written to a temporary name and renamed, so a reader sees all of it or nothing, and any number of processes may write at
once. Its first line records the hash of the rest; a file that does not match it is broken, and is rewritten.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import stat
import sys
import tempfile
import threading
import warnings
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from refocus.errors import CacheWarning

_HEADER = "# refocus sha256 "
_KEY = re.compile(r"[0-9a-zA-Z_-]{1,128}")
_lock = threading.Lock()
_modules: dict[tuple[Path, str], ModuleType] = {}


def key_of(*parts: object) -> str:
    """A file name for what these parts (by `repr`) and the versions of torch, triton and refocus determine."""
    text = "\0".join((*(repr(p) for p in parts), *_versions()))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def save(source: str, key: str) -> Path:
    """Make `<cache>/<key>.py` hold `source`, and return its path."""
    if not _KEY.fullmatch(key):
        raise ValueError(f"not a file name: {key!r}")
    text = f"{_HEADER}{_digest(source)}\n{source}"
    for folder in (directory(), _temporary()):
        path = folder / f"{key}.py"
        try:
            _put(path, text)
        except OSError:
            continue
        return path
    raise OSError(f"neither {directory()} nor {_temporary()} can be written")


def load_module(path: Path) -> ModuleType:
    """The generated file as a module, imported once for each content."""
    with _lock:
        text = path.read_text(encoding="utf-8")
        known = _modules.get((path, text))
        if known is None:
            name = f"refocus_kernels.k{path.stem}_{_digest(text)[:8]}"
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None
            known = importlib.util.module_from_spec(spec)
            sys.modules[name] = known  # Triton and tracebacks find the source through it.
            # Not by the loader: it would keep bytecode beside the file, and take it for that of other text which is
            # as long and was written within the same second.
            exec(compile(text, str(path), "exec"), known.__dict__)
            _modules[path, text] = known
        return known


def directory() -> Path:
    """The cache directory, created if need be; a temporary one where it cannot be used."""
    chosen = os.environ.get("REFOCUS_CACHE")
    folder = Path(chosen).expanduser() if chosen else _user_cache() / "refocus"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder if _ours(folder) else _temporary()
    except (OSError, RuntimeError):
        return _temporary()


def _put(path: Path, text: str) -> None:
    try:
        found = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        found = text + " "
    except UnicodeDecodeError:
        found = ""
    if found == text:
        return
    if found != text + " " and not _intact(found):
        warnings.warn(f"the kernel file {path} was broken and has been written again", CacheWarning, stacklevel=3)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _intact(text: str) -> bool:
    first, _, rest = text.partition("\n")
    return first == _HEADER + _digest(rest)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _ours(folder: Path) -> bool:
    """Whether only we can write there; others' files must not be imported."""
    status = folder.stat()
    if not hasattr(os, "getuid"):
        return os.access(folder, os.W_OK)
    if status.st_uid != os.getuid():
        return False
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        folder.chmod(0o700)
    return os.access(folder, os.W_OK | os.X_OK)


def _user_cache() -> Path:
    chosen = os.environ.get("XDG_CACHE_HOME")
    return Path(chosen) if chosen else Path.home() / ".cache"


@lru_cache(maxsize=1)
def _temporary() -> Path:
    return Path(tempfile.mkdtemp(prefix="refocus-"))


@lru_cache(maxsize=1)
def _versions() -> tuple[str, ...]:
    found = []
    for package in ("refocus", "torch", "triton"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} ?")
    return tuple(found)
