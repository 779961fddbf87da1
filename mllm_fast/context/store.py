"""A store of contexts: the same image with the same settings is compressed once, also by several processes.

Contexts are found by content: a hash of the pixels, the prompt, the settings, the model and its processor. They are
held in memory and in a folder, each up to a number of bytes, least recently used out first.
"""

from __future__ import annotations

import hashlib
import json
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..core.errors import InputError, check_choice
from ..models.fingerprint import fingerprint
from .compress import compress
from .context import Context
from .file_format import STORAGES, VERSION, pack, parse, unpack
from .folders import Folder, open_folder
from .registry import score_name
from .scores import PARTS, kept_count

if TYPE_CHECKING:
    from ..models.processing import Images
    from ..runtime.model_runner import ModelRunner

_MEMORY_BYTES = 1 << 30
_DISK_BYTES = 10 << 30
_KEPT_NAMES = {"key_norm": "norm"}  # what stores of earlier releases were keyed by
_PART = 24  # digits of a key's first and second part


class ContextStore:
    """Contexts in memory and, with `url`, in a folder that several processes may share.

    Args:
        url: a folder, or any URL that fsspec knows ("s3://bucket/contexts"); None keeps contexts in memory alone. In a
            folder on this machine two processes never compute the same context at once; elsewhere they may, and both
            write the same.
        memory_bytes, disk_bytes: budgets. A context larger than a budget is not kept there.
        storage: of the files, "full" or "int8"; see `Context.save`.

    `hits`, `misses`: contexts found, and computed. A folder that fails costs files and a warning, never an answer.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        memory_bytes: int = _MEMORY_BYTES,
        disk_bytes: int = _DISK_BYTES,
        storage: str = "full",
    ):
        for name, given in (("memory_bytes", memory_bytes), ("disk_bytes", disk_bytes)):
            if given < 0:
                raise InputError(f"{name} is a number of bytes, 0 or more, got {given}")
        check_choice("storage", storage, STORAGES)
        self.memory_bytes = memory_bytes
        self.storage = storage
        self.hits = self.misses = 0
        self.nbytes = 0  # in memory
        self._folder: Folder | None = None if url is None else open_folder(str(url), disk_bytes)
        self._held: OrderedDict[str, Context] = OrderedDict()
        self._guard = threading.Lock()
        self._locks = _KeyLocks(self._folder)

    def get(
        self,
        vlm: ModelRunner,
        image: Images,
        keep: float | int = 0.05,
        prompt: str = "Describe the image.",
        score: str = "generated",
        *,
        parts: str = "query+image",
        **options: Any,
    ) -> Context:
        """The context that `vlm.compress` makes of these arguments: found, or made now and kept."""
        score = score_name(score)
        check_choice("parts", parts, PARTS)
        kept_count(keep, 1 << 62)
        pictures = vlm.prompts.load(image)
        settings = {"keep": keep, "prompt": prompt, "score": score, "parts": parts, **options}
        key = self.key(vlm, pictures, settings)
        found = self.held(key)
        if found is None:
            with self._locks.alone(key):
                found = self.find(key, vlm)
                if found is None:
                    made = compress(vlm, pictures, **settings)
                    found = self.keep(key, made)
                    self._write(key, made)
        # what is held is held without the images, and for any VLM of the same model
        return replace(found, vlm=vlm, images=tuple(pictures))

    def held(self, key: str) -> Context | None:
        """The context of a key if it is in memory; without its images."""
        with self._guard:
            found = self._held.get(key)
            if found is not None:
                self._held.move_to_end(key)
                self.hits += 1
            return found

    def find(self, key: str, vlm: ModelRunner) -> Context | None:
        """The context of a key, from memory or the folder; without its images."""
        return self.held(key) or self._on_disk(key, vlm)

    def keep(self, key: str, made: Context) -> Context:
        """Hold a context that was made elsewhere in memory; as it will be found again."""
        found = self._stored_form(made)
        with self._guard:
            self.misses += 1
        self._remember(key, found)
        return found

    def write(self, key: str, made: Context) -> None:
        """Put such a context into the folder, if there is one."""
        if self._folder is not None:
            with self._locks.alone(key):
                self._write(key, made)

    def drop(self, key: str) -> bool:
        """Remove a context from memory and from the folder; whether it was in one of them."""
        with self._guard:
            old = self._held.pop(key, None)
            self.nbytes -= 0 if old is None else old.nbytes
        there = old is not None
        if self._folder is not None:
            with _no_answer_lost(self._folder, "emptied"):
                with self._folder.reading(key) as path:
                    there = there or path is not None
                self._folder.drop(key)
        return there

    def keys(self, tenant: str = "") -> list[str]:
        """Of the contexts of a tenant, in memory and in the folder, sorted."""
        with self._guard:
            found = set(self._held)
        if self._folder is not None:
            with _no_answer_lost(self._folder, "read"):
                found.update(self._folder.keys())
        return sorted(key for key in found if key.endswith(tenant_digest(tenant)))

    def count(self) -> int:
        """Contexts in memory."""
        with self._guard:
            return len(self._held)

    def key(self, vlm: ModelRunner, images: list[Any], settings: dict[str, Any], tenant: str = "") -> str:
        """The content's name, 64 hexadecimal digits: 24 of the images, 24 of everything, 16 of the `tenant`. Who asks
        in another tenant never finds it, and nobody else can tell that it is there."""
        # what decides how image and prompt are read, without reading them: a context that is held costs no more
        processor = vlm.processor
        plain = {n: v for n, v in vars(processor).items() if v is None or isinstance(v, (bool, int, float, str))}
        ids = processor.tokenizer(vlm.prompts.text(len(images), settings["prompt"])).input_ids
        reading = [ids, plain, processor.image_processor.to_dict(), vlm.model.generation_config.to_dict()]
        if settings.get("score") in _KEPT_NAMES:
            settings = {**settings, "score": _KEPT_NAMES[settings["score"]]}
        about = [VERSION, self.storage, fingerprint(vlm.model), settings]
        try:
            text = json.dumps(about, sort_keys=True)
        except TypeError as error:
            raise InputError(f"the store takes options of numbers, texts and lists alone ({error})") from None
        seen = pictures_digest(images, tenant)
        digest = hashlib.sha256(f"{tenant_digest(tenant)} {seen} {text}".encode())
        digest.update(json.dumps(reading, sort_keys=True, default=str).encode())
        return seen[:_PART] + digest.hexdigest()[:_PART] + tenant_digest(tenant)

    def clear(self) -> None:
        """Forget what is in memory; files stay."""
        with self._guard:
            self._held.clear()
            self.nbytes = 0

    def _stored_form(self, context: Context) -> Context:
        """A context as it will be found again: as int8 gives it back, without the images."""
        bare = replace(context, images=())
        if self.storage == "full":
            return bare
        tensors, metadata, _ = pack(vars(bare), self.storage)
        return Context(**unpack(*parse(self.storage, metadata, tensors), context.vlm), peak_nbytes=context.peak_nbytes)

    def _on_disk(self, key: str, vlm: ModelRunner) -> Context | None:
        if self._folder is None:
            return None
        found = None
        with _no_answer_lost(self._folder, "read"), self._folder.reading(key) as path:
            if path is None:
                return None
            try:
                found = Context.load(path, vlm)
            except InputError as error:
                if path.exists():  # else it was removed meanwhile, for the budget's sake
                    warnings.warn(f"a stored context is dropped and made again: {error}", stacklevel=3)
                    self._folder.drop(key)
        if found is None:
            return None
        with self._guard:
            self.hits += 1
        self._remember(key, found)
        return found

    def _remember(self, key: str, context: Context) -> None:
        with self._guard:
            old = self._held.pop(key, None)
            self.nbytes -= 0 if old is None else old.nbytes
            if context.nbytes > self.memory_bytes:
                return
            self._held[key] = context
            self.nbytes += context.nbytes
            while self.nbytes > self.memory_bytes:
                _, oldest = self._held.popitem(last=False)
                self.nbytes -= oldest.nbytes

    def _write(self, key: str, context: Context) -> None:
        if self._folder is not None:
            with _no_answer_lost(self._folder, "written to"):
                self._folder.write(key, lambda path: context.save(path, self.storage))


class _KeyLocks:
    """Locks by key, in this process and, in a folder on this machine, among all that use it."""

    def __init__(self, folder: Folder | None):
        self._folder = folder
        self._guard = threading.Lock()
        self._busy: dict[str, tuple[threading.Lock, int]] = {}  # of each key, and how many want it

    @contextmanager
    def alone(self, key: str) -> Iterator[None]:
        """Nobody else computes this key meanwhile, in this process or, in a folder here, in another."""
        with self._guard:
            lock, waiting = self._busy.get(key, (threading.Lock(), 0))
            self._busy[key] = lock, waiting + 1
        try:
            with lock, ExitStack() as stack:
                if self._folder is not None:
                    with _no_answer_lost(self._folder, "locked"):
                        stack.enter_context(self._folder.locked(key))
                yield
        finally:
            with self._guard:
                lock, waiting = self._busy.pop(key)
                if waiting > 1:
                    self._busy[key] = lock, waiting - 1


def pictures_digest(pictures: list[Any], tenant: str = "") -> str:
    """SHA-256 of pixels, in hexadecimal; keys of the same images and tenant begin with its first 24 digits."""
    digest = hashlib.sha256(tenant_digest(tenant).encode())
    for picture in pictures:
        digest.update(f"{picture.mode} {picture.size} ".encode())
        digest.update(picture.tobytes())
    return digest.hexdigest()


def tenant_digest(tenant: str) -> str:
    """The 16 digits that the keys of a tenant end with."""
    return hashlib.sha256(f"scope {tenant}".encode()).hexdigest()[:16]


@contextmanager
def _no_answer_lost(folder: Folder, what: str) -> Iterator[None]:
    """A folder that fails (full, taken away, not ours, out of reach) costs the file and not the answer."""
    try:
        yield
    except Exception as error:  # remote file systems raise what they like
        warnings.warn(f"the store {folder} could not be {what}: {error}", stacklevel=5)
