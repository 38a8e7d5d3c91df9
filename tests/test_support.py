"Pictures that are read ahead, and frozen values that are kept, are the right ones, whatever happens in between."
import errno
import multiprocessing
import os
import resource
from pathlib import Path

import pytest
import torch
from PIL import Image

from sdmad_nb.core.config import write_atomically
from sdmad_nb.data.cache import Cache
from sdmad_nb.data.support import FilesAhead
from sdmad_nb.lab.records import run_once


@pytest.fixture
def ahead(tmp_path):  # a hundred pictures, each as grey as its row says
    names = [tmp_path / f"{row}.png" for row in range(100)]
    for row, name in enumerate(names): Image.new("L", (8, 8), row).save(name)
    files = FilesAhead(names)
    files.workers = 2
    return files


def grey(picture): return torch.tensor(picture.getpixel((0, 0))[0])


def batch(files, start):  # -> rows that ten values were read from
    return files.prepare(list(range(start, start + 10)), grey).tolist()


class Interrupted:  # by Ctrl-C behind three of its values, once
    def __init__(self, stream): self.stream, self.left = stream, 3

    def __next__(self):
        self.left -= 1
        if self.left == -1: raise KeyboardInterrupt
        return next(self.stream)


def test_an_interrupted_batch_is_read_from_its_start(ahead):
    batch(ahead, 0)
    ahead.stream = Interrupted(ahead.stream)
    with pytest.raises(KeyboardInterrupt): batch(ahead, 10)
    assert batch(ahead, 10) == [*range(10, 20)]


def test_a_batch_that_is_asked_for_twice_starts_no_processes(ahead):
    first, stream = batch(ahead, 0), ahead.stream
    assert batch(ahead, 0) == first and ahead.stream is stream and batch(ahead, 10) == [*range(10, 20)]
    assert ahead.prepare([*range(10, 20)], lambda picture: grey(picture) + 1).tolist() == [*range(11, 21)]


def test_a_process_that_may_start_none_reads_alone(ahead):
    "Such as a worker of Dask."
    process = multiprocessing.get_context("fork").Process(target=batch, args=(ahead, 0), daemon=True)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_batch_is_pinned_as_a_whole(ahead, monkeypatch):
    "What pinned samples are stacked into is not pinned."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda values: values + 100)
    assert batch(ahead, 0) == [*range(100, 110)]


def test_a_cache_file_that_cannot_be_opened_just_now_stays(tmp_path):
    cache = Cache(tmp_path)
    cache.write("kind", ["a"], torch.ones(1, 2))
    usual, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, most))  # as if too many files were open
    try: found = cache.read("kind", ["a"])
    finally: resource.setrlimit(resource.RLIMIT_NOFILE, (usual, most))
    assert found == [None] and cache.read("kind", ["a"])[0].tolist() == [1, 1]


def write_half(path, data, *_, **options):  # and then the disk is full
    with open(path, "w" if isinstance(data, str) else "wb") as file: file.write(data[:len(data) // 2])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_file(folder): return write_atomically(folder / "a.txt", lambda path: path.write_text("new")).read_text()


def keep_values(folder):
    Cache(folder).write("kind", ["a"], torch.ones(1, 2))
    return Cache(folder).read("kind", ["a"])[0].tolist()


def make_record(folder): return run_once(folder / "a.json", {"seed": 0}, lambda: {"metrics": {"x": 1}})["metrics"]


@pytest.mark.parametrize("work, gives", [(write_file, "new"), (keep_values, [1, 1]), (make_record, {"x": 1})])
def test_a_full_disk_ends_in_a_sentence_and_the_next_run_makes_up_for_it(work, gives, tmp_path, monkeypatch):
    for name in ("a.txt", "a.json"): (tmp_path / name).write_text("old")
    files = lambda: {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"}
    before, says = files(), r"^cannot write \S+ \(No space left on device\): free some space there, .* run again.*$"
    with monkeypatch.context() as full:
        for name in ("write_text", "write_bytes"): full.setattr(Path, name, write_half)
        with pytest.raises(OSError, match=says): work(tmp_path)
    assert files() == before, "nothing is half-written, and what was there is whole"
    assert work(tmp_path) == gives
