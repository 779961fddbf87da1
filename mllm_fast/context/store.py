"""A store of contexts, in memory and in a folder that several processes may share.

The same image with the same settings is compressed only once. The store finds a context by its content: a hash of the
pixels, the prompt, the settings, the model and its processor. Memory and folder each have a budget in bytes; the least
recently used contexts are removed first.
"""

from __future__ import annotations

import hashlib
import json
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..core.errors import InputError, check_choice
from ..core.keep import parse_keep
from ..core.video import LoadedVideo, Video
from ..models.fingerprint import fingerprint
from ..models.media import clips, parts_of
from ..runtime.hooks import model_lock
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
_KEPT_NAMES = {"key_norm": "norm"}  # keys use the older name, so stores of earlier releases stay valid
_PART = 24  # length of a key's first and second part, in digits


class ContextStore:
    """A store of contexts in memory and, with `url`, in a folder that several processes may share.

    If the folder fails, the store issues a warning and a file may be missing, but every call still gets its answer.

    Args:
        url: a folder, or any URL that fsspec knows ("s3://bucket/contexts"). With None contexts are kept in memory
            alone. In a folder on this machine two processes never compute the same context at once. At another URL they
            may, and then both write the same file.
        memory_bytes: the memory budget. A context that is larger is not kept in memory.
        disk_bytes: the folder's budget. A context that is larger is not kept in the folder.
        storage: how files store keys and values, "full" or "int8"; see `Context.save`.

    Attributes:
        hits: how many contexts were found.
        misses: how many contexts were computed.
        nbytes: the bytes of all contexts in memory.
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
        self.nbytes = 0  # bytes in memory
        self._folder: Folder | None = None if url is None else open_folder(str(url), disk_bytes)
        self._held: OrderedDict[str, Context] = OrderedDict()
        self._guard = threading.Lock()
        self._locks = _KeyLocks(self._folder)

    def get(
        self,
        vlm: ModelRunner,
        image: Images,
        keep: float | int | str = 0.05,
        prompt: str = "Describe the image.",
        score: str = "generated",
        *,
        parts: str = "query+image",
        **options: Any,
    ) -> Context:
        """Return the context that `vlm.compress` makes of these arguments.

        It is found in the store, or else computed now and kept.
        """
        score, keep = score_name(score), parse_keep(keep)
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
        # the store holds contexts without images, and shares them among all VLMs of the same model
        return replace(found, vlm=vlm, images=tuple(pictures))

    def held(self, key: str) -> Context | None:
        """Return the context of a key, without its images, if it is in memory."""
        with self._guard:
            found = self._held.get(key)
            if found is not None:
                self._held.move_to_end(key)
                self.hits += 1
            return found

    def find(self, key: str, vlm: ModelRunner) -> Context | None:
        """Return the context of a key, without its images, from memory or from the folder; None if neither has it."""
        return self.held(key) or self._on_disk(key, vlm)

    def keep(self, key: str, made: Context) -> Context:
        """Put a newly computed context in memory, and return it as it will be found again."""
        found = self._stored_form(made)
        with self._guard:
            self.misses += 1
        self._remember(key, found)
        return found

    def write(self, key: str, made: Context) -> None:
        """Write a newly computed context to the folder, if there is one."""
        if self._folder is not None:
            with self._locks.alone(key):
                self._write(key, made)

    def drop(self, key: str) -> bool:
        """Remove a context from memory and from the folder, and return whether it was in one of them."""
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
        """Return the sorted keys of all contexts of a tenant, in memory and in the folder."""
        with self._guard:
            found = {key for key, one in self._held.items() if one.settings["keep"] != "off"}
        if self._folder is not None:
            with _no_answer_lost(self._folder, "read"):
                found.update(self._folder.keys())
        return sorted(key for key in found if key.endswith(tenant_digest(tenant)))

    def count(self) -> int:
        """Return the number of contexts in memory."""
        with self._guard:
            return len(self._held)

    def key(self, vlm: ModelRunner, images: list[Any], settings: dict[str, Any], tenant: str = "") -> str:
        """Return the key of some content: 64 hexadecimal digits.

        The settings have the prompt, or in its place the token ids of a whole prefix as "ids".

        The first 24 digits hash the images, the next 24 hash everything, and the last 16 hash the tenant. A request
        from another tenant never finds the context and cannot tell that it is there.
        """
        # hash the settings that decide how image and prompt are processed, not the result: a hit skips processing
        processor = vlm.processor
        plain = {n: v for n, v in vars(processor).items() if v is None or isinstance(v, (bool, int, float, str))}
        ids = settings.get("ids")
        if ids is None:
            ids = processor.tokenizer(vlm.prompts.text(parts_of(images), settings["prompt"])).input_ids
        reading = [ids, plain, processor.image_processor.to_dict(), vlm.model.generation_config.to_dict()]
        if clips(images):
            reading.append(processor.video_processor.to_dict())
        if settings.get("budget") == "all":  # the default has the key of a context that names none
            settings = {name: given for name, given in settings.items() if name != "budget"}
        if settings.get("score") in _KEPT_NAMES:
            settings = {**settings, "score": _KEPT_NAMES[settings["score"]]}
        if vlm.text.split is not None and self._folder is not None:
            raise InputError(
                "a folder of contexts serves models that lie in one process: leave it out, or save contexts one by one"
                " with Context.save, which all processes call"
            )
        # a divided model's weights are not in their places during a pass of another thread
        with nullcontext() if vlm.text.split is None else model_lock(vlm.text):
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
        """Remove all contexts from memory; files stay."""
        with self._guard:
            self._held.clear()
            self.nbytes = 0

    def _stored_form(self, context: Context) -> Context:
        """Return a context as it will be found again: without images, and with int8's rounding if the store uses it.

        The prefix of a prompt that is read word for word stays as exact as it is.
        """
        bare = replace(context, images=())
        if self.storage == "full" or context.settings["keep"] == "off":
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
                if path.exists():  # otherwise it was removed meanwhile to keep the budget
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
    """Locks by key, within this process and, for a folder on this machine, among all processes that use it."""

    def __init__(self, folder: Folder | None):
        self._folder = folder
        self._guard = threading.Lock()
        self._busy: dict[str, tuple[threading.Lock, int]] = {}  # key -> its lock and how many threads use it

    @contextmanager
    def alone(self, key: str) -> Iterator[None]:
        """Hold a key's lock, so that no other thread computes the key meanwhile.

        For a folder on this machine, no other process computes it either.
        """
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
    """Return the SHA-256 of the tenant and of the pixels of images and videos, in hexadecimal.

    Keys of the same images and tenant begin with its first 24 digits.
    """
    digest = hashlib.sha256(tenant_digest(tenant).encode())
    for picture in pictures:
        frames = [picture]
        if isinstance(picture, Video):  # not read yet: who shares requests out by their pictures
            digest.update(f"file {picture.num_frames} {picture.fps} ".encode() + bytes(picture.source))
            continue
        if isinstance(picture, LoadedVideo):
            frames = list(picture.frames)
            digest.update(f"video {picture.indices} {picture.seconds} {picture.duration} {picture.as_images} ".encode())
        for frame in frames:
            digest.update(f"{frame.mode} {frame.size} ".encode())
            digest.update(frame.tobytes())
    return digest.hexdigest()


def tenant_digest(tenant: str) -> str:
    """Return the 16 hexadecimal digits that all keys of a tenant end with."""
    return hashlib.sha256(f"scope {tenant}".encode()).hexdigest()[:16]


@contextmanager
def _no_answer_lost(folder: Folder, what: str) -> Iterator[None]:
    """Turn an error of the folder into a warning, so that the call still gets its answer.

    A folder may be full, deleted, owned by somebody else or out of reach.
    """
    try:
        yield
    except Exception as error:  # remote file systems raise errors of any type
        warnings.warn(f"the store {folder} could not be {what}: {error}", stacklevel=5)
