"""A store computes each context once, forgets the least recently used, and survives what disks and processes do."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from waiting import HANG

import mllm_fast as mf
from mllm_fast.context import folders
from mllm_fast.context import store as store_module
from mllm_fast.context.store import ContextStore
from mllm_fast.core.files import TEMPORARY

ASKED = {"keep": 0.3, "prompt": "describe this", "score": "query"}
FORK = multiprocessing.get_context("fork")


def pictures(count: int) -> list[Image.Image]:
    draw = np.random.default_rng(3).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in draw]


@pytest.fixture
def llava(built):
    return mf.VLM(*built("llava"))


def same(a: mf.Context, b: mf.Context) -> bool:
    return torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values) and torch.equal(a.positions, b.positions)


@pytest.mark.parametrize("url", [None, "folder", "memory://contexts"])
def test_computed_once(llava, tmp_path, url):
    where = str(tmp_path / "a") if url == "folder" else url
    store = ContextStore(where)
    first, second = pictures(2)
    made = [store.get(llava, one, **ASKED) for one in (first, second, first, first.copy())]
    assert (store.hits, store.misses) == (2, 2)
    assert made[0].keys is made[2].keys is made[3].keys
    assert same(made[0], llava.compress(first, **ASKED))
    if url is not None:
        other = ContextStore(where)
        found = other.get(llava, first, **ASKED)
        assert (other.hits, other.misses) == (1, 0)
        assert same(found, made[0])
        assert found.images[0].tobytes() == first.tobytes()
        other.clear()
        assert other.nbytes == 0
        assert same(other.get(llava, first, **ASKED), made[0])


def test_everything_that_matters_is_in_the_key(llava, built):
    store = ContextStore()
    first, second = pictures(2)
    wide = Image.fromarray(np.asarray(first).reshape(8, 32, 3))
    variants = [
        ([first], ASKED),
        ([second], ASKED),
        ([wide], ASKED),
        ([first.convert("L")], ASKED),
        ([first, second], ASKED),
        ([first], ASKED | {"prompt": "describe"}),
        ([first], ASKED | {"keep": 0.4}),
        ([first], ASKED | {"score": "key_norm"}),
        ([first], ASKED | {"parts": "image"}),
    ]
    keys = [store.key(llava, *variant) for variant in variants]
    keys.append(store.key(mf.VLM(*built("internvl")), *variants[0]))
    keys.append(ContextStore(storage="int8").key(llava, *variants[0]))
    size = llava.processor.image_processor.image_mean
    llava.processor.image_processor.image_mean = [0.4] * 3
    keys.append(store.key(llava, *variants[0]))
    llava.processor.image_processor.image_mean = size
    llava.processor.num_additional_image_tokens += 1
    keys.append(store.key(llava, *variants[0]))
    llava.processor.num_additional_image_tokens -= 1
    assert len(set(keys)) == len(keys)
    assert store.key(llava, [first.copy()], dict(ASKED)) == keys[0]


def test_a_default_that_is_named_is_the_same_context(llava):
    store, (one, _) = ContextStore(), pictures(2)
    plain = store.get(llava, one, **ASKED)
    assert store.get(llava, one, **ASKED, budget="all").keys is plain.keys
    assert store.get(llava, one, **ASKED, budget="frame").settings["budget"] == "frame"
    assert (store.hits, store.misses) == (1, 2)


def test_the_least_recently_used_goes_first(llava, tmp_path, monkeypatch):
    """In memory and on disk, whatever the clock does."""
    a, b, c = pictures(3)
    one = llava.compress(a, **ASKED)
    probe = ContextStore(str(tmp_path / "probe"))
    probe.get(llava, a, **ASKED)
    ((_, size, _),) = probe._folder.files()
    now = iter([10**18, 5 * 10**17, 4 * 10**18, 10**18, 2, 1])
    monkeypatch.setattr(folders.time, "time_ns", lambda: next(now, 7))
    store = ContextStore(str(tmp_path / "a"), memory_bytes=2 * one.nbytes, disk_bytes=2 * size + 10)
    for picture in (a, b, a, c):
        store.get(llava, picture, **ASKED)
        if picture is a:
            store.clear()  # so that the file is used
    assert store.nbytes <= store.memory_bytes
    assert len(store._folder.files()) == 2
    fresh = ContextStore(str(tmp_path / "a"), disk_bytes=2 * size + 10)
    for picture in (a, c):
        fresh.get(llava, picture, **ASKED)
    assert (fresh.hits, fresh.misses) == (2, 0)
    fresh.get(llava, b, **ASKED)
    assert fresh.misses == 1


def test_memory_keeps_its_budget(llava):
    a, b, c = pictures(3)
    size = llava.compress(a, **ASKED).nbytes
    store = ContextStore(memory_bytes=2 * size)
    for picture in (a, b, a, c, a):
        store.get(llava, picture, **ASKED)
    assert (store.misses, store.hits, store.nbytes) == (3, 2, 2 * size)
    store.get(llava, b, **ASKED)
    assert store.misses == 4
    small = ContextStore(memory_bytes=size - 1, disk_bytes=0)
    small.get(llava, a, **ASKED)
    assert small.nbytes == 0


def test_threads_wait_for_each_other(llava, monkeypatch):
    calls = []
    compress = store_module.compress
    monkeypatch.setattr(
        store_module, "compress", lambda *a, **k: calls.append(1) or time.sleep(0.05) or compress(*a, **k)
    )
    store, found = ContextStore(), []
    picture = pictures(1)[0]
    threads = [threading.Thread(target=lambda: found.append(store.get(llava, picture, **ASKED))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    assert len(calls) == 1
    assert len(found) == 6
    assert store._locks._busy == {}


def fill(folder: str, model, many, misses) -> None:
    torch.set_num_threads(1)
    store = ContextStore(folder)
    for picture in many:
        store.get(model, picture, **ASKED)
    misses.put(store.misses)


def test_processes_compute_each_context_once(llava, tmp_path):
    many, misses = pictures(6), FORK.Queue()
    workers = [FORK.Process(target=fill, args=(str(tmp_path), llava, many[i:] + many[:i], misses)) for i in range(3)]
    for worker in workers:
        worker.start()
    assert sum(misses.get(timeout=HANG) for _ in workers) == 6
    for worker in workers:
        worker.join(HANG)
        assert worker.exitcode == 0


def test_a_killed_writer_is_cleared_away(llava, tmp_path, monkeypatch):
    """Killed with the file half written: no entry, no lock is left, and the next one to tidy up removes the rest."""
    first, second = pictures(2)

    def die() -> None:
        torch.set_num_threads(1)
        monkeypatch.setattr(os, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        ContextStore(str(tmp_path)).get(llava, first, **ASKED)

    worker = FORK.Process(target=die)
    worker.start()
    worker.join(HANG)
    assert worker.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.glob(f"??/{TEMPORARY}*"))) == 1
    store = ContextStore(str(tmp_path))
    store.get(llava, second, **ASKED)
    store.get(llava, second, **(ASKED | {"keep": 0.5}))
    assert list(tmp_path.glob(f"??/{TEMPORARY}*")) == []
    assert store.get(llava, first, **ASKED).num_tokens
    assert store.misses == 3


@pytest.mark.parametrize("damage", ["cut off", "a bit", "empty"])
def test_a_damaged_entry_is_made_again(llava, tmp_path, damage):
    picture = pictures(1)[0]
    made = ContextStore(str(tmp_path)).get(llava, picture, **ASKED)
    (path,) = tmp_path.glob("??/*.safetensors")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes({"cut off": data[:-40], "a bit": data, "empty": b""}[damage])
    store = ContextStore(str(tmp_path))
    with pytest.warns(UserWarning, match="dropped and made again"):
        again = store.get(llava, picture, **ASKED)
    assert same(again, made)
    assert store.misses == 1
    fresh = ContextStore(str(tmp_path))
    assert same(fresh.get(llava, picture, **ASKED), made)
    assert fresh.hits == 1


def test_a_full_disk_costs_the_file_alone(llava, tmp_path):
    """Files may not grow beyond a few bytes: what a full disk does to a write."""
    picture = pictures(1)[0]
    store = ContextStore(str(tmp_path))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            made = store.get(llava, picture, **ASKED)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert any("could not be written to" in str(one.message) for one in seen)
    assert same(made, llava.compress(picture, **ASKED))
    assert store.get(llava, picture, **ASKED).keys is made.keys
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "locks"] == []


def test_a_folder_that_is_taken_away(llava, tmp_path):
    import shutil

    store = ContextStore(str(tmp_path / "a"))
    first, second = pictures(2)
    store.get(llava, first, **ASKED)
    shutil.rmtree(tmp_path / "a")
    store.clear()
    store.get(llava, second, **ASKED)
    assert store.get(llava, first, **ASKED).num_tokens
    assert len(list((tmp_path / "a").glob("??/*.safetensors"))) == 2


def test_where_a_store_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(mf.InputError, match="no folder that can be written to"):
        ContextStore(str(tmp_path / "file"))
    with pytest.raises(mf.InputError, match="no folder that can be written to"):
        ContextStore("/proc/contexts")
    with pytest.raises(mf.InputError, match="no store can be opened there"):
        ContextStore("nowhere://contexts")
    with pytest.raises(mf.InputError, match="disk_bytes is a number of bytes"):
        ContextStore(str(tmp_path), disk_bytes=-1)
    with pytest.raises(mf.InputError, match="storage is one of"):
        ContextStore(storage="zip")


def test_a_remote_folder_keeps_its_budget(llava):
    a, b, c, d = pictures(4)
    probe = ContextStore("memory://probe")
    probe.get(llava, a, **ASKED)
    files = probe._folder._fs.ls("/probe", detail=True)
    assert len(files) == 1
    store = ContextStore("memory://budget", disk_bytes=2 * files[0]["size"] + 100)
    for picture in (a, b, c):
        store.get(llava, picture, **ASKED)
    probe._folder._fs.pipe_file("/budget/model.safetensors", b"not ours")
    store.get(llava, d, **ASKED)
    left = [one["name"] for one in store._folder._fs.ls("/budget", detail=True)]
    assert len(left) == 3
    assert "/budget/model.safetensors" in left
    fresh = ContextStore("memory://budget")
    fresh.get(llava, d, **ASKED)
    assert (fresh.hits, fresh.misses) == (1, 0)


def test_files_of_others_stay(llava, tmp_path):
    """A model's shards beside the store's own folders are neither counted nor removed."""
    others = [tmp_path / "v2" / "model-00001.safetensors", tmp_path / "ab" / "model.safetensors"]
    for other in others:
        other.parent.mkdir()
        other.write_bytes(bytes(10_000))
    store = ContextStore(str(tmp_path), disk_bytes=6000)
    for picture in pictures(3):
        store.get(llava, picture, **ASKED)
    assert all(other.stat().st_size == 10_000 for other in others)
    assert sum(size for _, size, _ in store._folder.files()) <= 6000


def test_a_folder_that_fails_costs_no_answer(llava, tmp_path, monkeypatch):
    picture = pictures(1)[0]
    store = ContextStore(str(tmp_path))

    def fail(*_, **__):
        raise PermissionError(13, "not yours")

    monkeypatch.setattr(os, "open", fail)
    with pytest.warns(UserWarning, match=r"could not be (locked|written to)"):
        made = store.get(llava, picture, **ASKED)
    monkeypatch.undo()
    assert same(made, llava.compress(picture, **ASKED))


def test_int8_answers_are_the_same_from_memory_and_from_disk(llava, tmp_path):
    picture = pictures(1)[0]
    store = ContextStore(str(tmp_path), storage="int8")
    made = store.get(llava, picture, **ASKED)
    store.clear()
    assert same(store.get(llava, picture, **ASKED), made)
    assert not same(made, llava.compress(picture, **ASKED))


def test_options_that_have_no_name_are_refused(llava):
    with pytest.raises(mf.InputError, match="options of numbers, texts and lists alone"):
        ContextStore().get(llava, pictures(1)[0], **ASKED, logits_processor=object())


def test_another_vlm_of_the_same_model_finds_it(llava):
    store, picture = ContextStore(), pictures(1)[0]
    store.get(llava, picture, **ASKED)
    other = mf.VLM(llava.model, llava.processor)
    assert store.get(other, picture, **ASKED).vlm is other
    assert store.hits == 1
    assert all(context.images == () for context in store._held.values()), "images are not held"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 0.0}, "above 0 and at most 1.0, got 0.0"),
        ({"keep": float("nan")}, "got nan"),
        ({"score": "best"}, "score is one of generated, query, key_norm, random, got 'best'"),
        ({"parts": "text"}, "parts is one of"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_read(llava, change, message):
    with pytest.raises(mf.InputError, match=message):
        ContextStore().get(llava, pictures(1)[0], **(ASKED | change))
