"""What the suite tries on a seeded sample, for as long as there is time: hostile records, damaged containers, locks.

python benchmarks/fuzz.py {records,containers,locks} [SECONDS] [SEED]

Exit code 1 if anything is wrong; what to repeat it with is printed.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import results
from harness.errors import AssayError, DataError, StoreError
from harness.record import new_run_id
from results import queries, records
from results.store import Store
from tests.unit.factories import record
from tests.unit.test_hostile_records import mutated, use_everything


def fuzz_records(deadline: float, seed: int) -> Iterator[str]:
    """Mutated records are refused, or every command can use them."""
    while time.monotonic() < deadline:
        chance = random.Random(seed)
        with tempfile.TemporaryDirectory() as folder:
            store = Store(Path(folder) / "assay.duckdb")
            for _ in range(200):
                try:
                    stored = records.checked("record", mutated(chance))
                except StoreError:
                    continue
                records.write(store.folder, stored)
            try:
                store.sync()
                use_everything(store.path)
                # Records that contradict one another are what check is there to say.
                found = [text for text in results.check(store.path) if "recorded with different sizes" not in text]
                wrong = [*found, *map(str, results.rebuild(store.path).damaged)]
            except Exception as error:  # noqa: BLE001  this is what is looked for
                wrong = [f"{type(error).__name__}: {error}"]
        yield from (f"seed {seed}: {text}" for text in wrong)
        seed += 1


def fuzz_containers(deadline: float, seed: int) -> Iterator[str]:
    """A changed container whose checksum is right is read, or is a DataError, within bounds."""
    from harness.storage.container import CHECKSUM_BYTES, Container
    from tests.unit.test_container_damage import MOST, small_state

    bodies = [Container(entropy=how).encode(small_state())[:-CHECKSUM_BYTES] for how in ("auto", "rans", "huffman")]
    while time.monotonic() < deadline:
        chance = random.Random(seed)
        body, other = bytearray(chance.choice(bodies)), chance.choice(bodies)
        for _ in range(chance.choice((1, 1, 2, 3, 6))):
            at, size = chance.randrange(8, len(body)), chance.choice((1, 1, 2, 4, 16))
            replacement = chance.choice((other[at : at + size], chance.randbytes(size), b"\xff" * size, b"\0", b""))
            body[at : at + chance.choice((0, size))] = replacement
        blob = bytes(body) + hashlib.blake2b(body, digest_size=CHECKSUM_BYTES).digest()
        begin = time.perf_counter()
        try:
            found = Container().decode(blob, max_bytes=MOST)
            if sum({id(tensor): tensor.nbytes for tensor in found.values()}.values()) > MOST:
                yield f"seed {seed}: more than max_bytes"
        except DataError:
            pass
        except Exception as error:  # noqa: BLE001  this is what is looked for
            yield f"seed {seed}: {type(error).__name__}: {error}"
        if time.perf_counter() - begin > 10:
            yield f"seed {seed}: {time.perf_counter() - begin:.0f} s"
        seed += 1


def _work(kind: str, db: Path, stop: float, queue: Any) -> None:
    done, errors = 0, []
    while time.time() < stop:
        try:
            if kind == "write":
                Store(db).add({**record(), "run_id": new_run_id()})
            else:
                queries.select(db, "latest")
            done += 1
        except AssayError as error:
            errors.append(f"{kind}: {error}")
    queue.put((kind, done, errors))


def fuzz_locks(deadline: float, _: int) -> Iterator[str]:
    """Eight writers and four readers in a loop: nobody gives up, and nobody is starved."""
    with tempfile.TemporaryDirectory() as folder:
        db, context = Path(folder) / "assay.duckdb", multiprocessing.get_context("spawn")
        Store(db).add(record())
        queue, stop = context.Queue(), time.time() + deadline - time.monotonic()
        kinds = ["write"] * 8 + ["read"] * 4
        workers = [context.Process(target=_work, args=(kind, db, stop, queue)) for kind in kinds]
        for worker in workers:
            worker.start()
        found = [queue.get() for _ in workers]
        for worker in workers:
            worker.join()
        print({kind: sorted(done for name, done, _ in found if name == kind) for kind in ("write", "read")})
        yield from (text for _, _, errors in found for text in errors)
        yield from (f"a {kind}r did nothing" for kind, done, _ in found if not done)
        yield from results.check(db)


def main() -> int:
    kind = sys.argv[1] if len(sys.argv) > 1 else ""
    seconds, seed = float((sys.argv[2:] or ["60"])[0]), int((sys.argv[3:] or ["0"])[0])
    look = {"records": fuzz_records, "containers": fuzz_containers, "locks": fuzz_locks}.get(kind)
    if look is None:
        print(__doc__)
        return 2
    wrong = list(look(time.monotonic() + seconds, seed))
    print("\n".join(wrong) or f"{kind}: nothing wrong in {seconds:g} s")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
