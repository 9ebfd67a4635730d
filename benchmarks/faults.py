"""An adversary against training runs: kills, damage, second starts and full disks, each with its expected outcome.

    python benchmarks/faults.py [--events 100] [--seed 0] [--json FILE]

Tiny runs of eight steps, half of them on-policy, save after every second one. The adversary draws from a seed what
happens to each attempt and between two attempts:

- kill: SIGKILL to rank 0, to another rank (the rest follows half a second later, as by a launcher) or to all, in
  start-up, in a rollout or in a save. The next attempt goes on from the newest checkpoint.
- layout: as a kill, and the next attempt has other TP, PP and ranks.
- flip, truncate: one bit, or the end, of a file of any kind that the run folder holds. A damaged checkpoint does not
  count; if it was the only one, the run refuses to start over. No other file stops a run.
- torn: garbage, NUL bytes or half a line in metrics.jsonl. They are cut.
- second start: a second `train` while the first runs. It is refused and names the first, which goes on.
- full disk: the run's file system (in memory) has no room for the next checkpoint. The run ends with the disk's error.

After a few events a run may end. Then nothing may be lost: its samples and metrics must be those of a run that nothing
met, its weights bit for bit, after a change of layout within the tolerance of tests/stack/test_resume.py. Each attempt
must also have resumed from the newest complete checkpoint. The exit status says whether all of it held.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # the harness that starts ranks and kills them

import interruptions
import ranks
import tiny_run
import torch

from nemo_tsdkd.config.train_config import TrainConfig

EVENTS_PER_RUN = 6
STYLES = ("sync", "async", "layouts", "disk", "async disk")
TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
LAYOUTS = ((2, {TP: 2}), (1, {}), (2, {PP: 2}))  # with one data-parallel rank each
NAMES = ("TP 2", "one rank", "PP 2")
LINE = "{:>5} {:>4} {:<11} {:<50} {:<41} {}"
TORN = (b'{"step": 99, "lo', b"\0" * 64 + b"\n", b"\xff\xfegarbage\n", b'{"step": 1}garbage\n', b"\0" * 300)


@dataclass
class Event:
    number: int
    run: int
    style: str
    what: str
    outcome: str
    as_expected: bool


def configure(models: Path, run_dir: Path, style: str, layout: int = 0) -> TrainConfig:
    world_size, parallel = LAYOUTS[layout] if style == "layouts" else (2, {})
    # With other layouts a sum's order changes, and one other token would make another run: they read their responses.
    config = tiny_run.config(models, run_dir, world_size, lmbda=0.0 if style == "layouts" else 0.5, **parallel)
    config.max_steps, config.checkpoint.every_n_steps, config.checkpoint.keep_last = 8, 2, 3
    config.checkpoint.async_save = style.startswith("async")
    return config


class Adversary:
    """What happens to one run."""

    def __init__(self, models: Path, folder: Path, style: str, draw: random.Random, start_up: float) -> None:
        self.models, self.folder, self.style, self.draw, self.start_up = models, folder, style, draw, start_up
        self.run_dir = folder / "run"
        self.layout = 0
        self.outcome: interruptions.Outcome | None = None  # of the run's end
        self.unreliable_steps: set[int] = set()  # whose lines of metrics.jsonl were damaged
        self.problems: list[str] = []

    def config(self) -> TrainConfig:
        return configure(self.models, self.run_dir, self.style, self.layout)

    def happen(self) -> tuple[str, str]:
        """One event: what it was, and what came of it."""
        kinds: list[Callable[[], tuple[str, str]]] = [self.kill, self.kill, self.flip, self.truncate, self.torn]
        kinds += [self.change_layout] * 3 if self.style == "layouts" else [self.second_start]
        kinds += [self.fill_disk] * 4 if "disk" in self.style else []
        if not (self.run_dir / "metrics.jsonl").exists():
            kinds = [self.kill]  # nothing is there that could be damaged
        return self.draw.choice(kinds)()

    # ---- events -----------------------------------------------------------------------------------------------------

    def kill(self) -> tuple[str, str]:
        world_size = self.config().parallel.world_size
        who = self.draw.choice(["rank 0", f"rank {world_size - 1}", "all ranks"])
        victims = [] if who == "all ranks" else [int(who.split()[1])]
        moment, when = self.moment()
        return f"kill {who} in {when}", self.attempt(kill_when=moment, victims=victims)

    def change_layout(self) -> tuple[str, str]:
        what, outcome = self.kill()
        self.layout = (self.layout + self.draw.randrange(1, len(LAYOUTS))) % len(LAYOUTS)
        return f"{what}, then {NAMES[self.layout]}", outcome

    def flip(self) -> tuple[str, str]:
        def flip(content: bytearray) -> bytes:
            content[self.draw.randrange(len(content))] ^= 1 << self.draw.randrange(8)
            return content

        return self.damage("flip", flip)

    def truncate(self) -> tuple[str, str]:
        return self.damage("truncate", lambda content: content[: self.draw.randrange(len(content))])

    def damage(self, name: str, change: Callable[[bytearray], bytes]) -> tuple[str, str]:
        """Damage a file drawn by its kind. The next attempt goes on for a while or is refused."""
        kinds: dict[str, list[Path]] = {}
        newest = max(self.complete_steps(), default=None)
        for path in self.run_dir.rglob("*"):
            inside = path.relative_to(self.run_dir)
            if not path.is_file() or not path.stat().st_size or inside.name.startswith(("samples_", ".")):
                continue
            if inside.parts[0] == "checkpoints" and inside.parts[1] != f"step_{newest}":
                continue
            of_checkpoint = inside.parts[0] == "checkpoints"
            kind = "/".join((*inside.parts[2 if of_checkpoint else 0 : -1], path.suffix or path.name))
            kinds.setdefault(f"checkpoint/{kind}" if of_checkpoint else kind, []).append(path)
        path = self.draw.choice(sorted(kinds[self.draw.choice(sorted(kinds))]))
        before = path.read_bytes()
        path.write_bytes(change(bytearray(before)))
        inside = path.relative_to(self.run_dir)
        if inside.name == "metrics.jsonl":
            self.note_damaged_rows(before, path.read_bytes())
        what = f"{name} {inside}"
        if inside.parts[0] == "checkpoints" and not self.complete_steps():
            said = interruptions.refusals(self.config())
            path.write_bytes(before)
            if not all("checkpoint.start_over=true" in text for text in said):
                self.problems.append(f"not refused: {said}")
            return what, "the only checkpoint: refused to start over"
        return what, self.attempt(kill_when=self.moment()[0])

    def torn(self) -> tuple[str, str]:
        line = self.draw.choice(TORN)
        with (self.run_dir / "metrics.jsonl").open("ab") as file:
            file.write(line)
        return f"torn line {line[:12]!r}", self.attempt(kill_when=self.moment()[0])

    def second_start(self) -> tuple[str, str]:
        said: list[str] = []
        delay, held = self.draw.uniform(0, 0.3), []

        def start_another() -> bool:
            if not held and any(state(p) == "unreleased" for p in (self.run_dir / "lock").glob("*.json")):
                held.append(time.monotonic())
            if held and not said and time.monotonic() - held[0] >= delay:
                said.extend(interruptions.refusals(self.config()))
            return False

        outcome = self.attempt(kill_when=start_another)
        if said and not all("in use by" in text and "process" in text for text in said):
            self.problems.append(f"not refused: {said}")
        return "second start", f"{'refused' if said else 'came too late'}; {outcome}"

    def fill_disk(self) -> tuple[str, str]:
        """Leave less room than a checkpoint takes."""
        size = max((size_of(f) for f in (self.run_dir / "checkpoints").glob("step_*")), default=200_000)
        room = self.draw.randrange(size // 10, size)
        free = int(subprocess.check_output(["stat", "-f", "-c", "%a %S", self.folder]).split()[0]) * 4096
        filler = self.folder / "filler"
        subprocess.run(["fallocate", "-l", str(max(4096, free - room)), filler], check=True)
        try:
            outcome = self.attempt()
        except AssertionError as error:
            outcome = "ended with the disk's error"
            if "No space left on device" not in str(error):
                self.problems.append(f"the error does not name the disk: {str(error)[-300:]}")
        finally:
            filler.unlink()
        return f"disk with {room >> 10} KiB left", outcome

    # ---- attempts ---------------------------------------------------------------------------------------------------

    def moment(self) -> tuple[Callable[[], bool], str]:
        """A condition that comes true once in the next attempt, and what it waits for."""
        when = self.draw.choices(["start-up", "rollout", "save"], [1, 2, 2])[0]
        began, steps = time.monotonic(), self.draw.randrange(1, 5)
        delay = self.draw.uniform(0, self.start_up if when == "start-up" else 0.05)
        samples, known = self.run_dir / "samples_0.jsonl", len(lines(self.run_dir / "samples_0.jsonl"))
        old = set((self.run_dir / "checkpoints").glob("step_*/unfinished"))
        met: list[float] = [began] if when == "start-up" else []

        def holds() -> bool:
            if not met and when == "rollout" and len(lines(samples)) >= known + steps:
                met.append(time.monotonic())
            if not met and when == "save" and set((self.run_dir / "checkpoints").glob("step_*/unfinished")) - old:
                met.append(time.monotonic())
            return bool(met) and time.monotonic() - met[0] >= delay

        return holds, when

    def attempt(self, **kill: object) -> str:
        """Run until the end or the kill; check that it went on where it should have."""
        samples = self.run_dir / "samples_0.jsonl"
        known, whole = len(lines(samples)), max(self.complete_steps(), default=0)
        self.outcome = None
        try:
            self.outcome = interruptions.train(self.config(), **kill)
        finally:
            began = next((json.loads(line)[0] for line in lines(samples)[known:]), None)
            if began not in (None, whole + 1):
                self.problems.append(f"went on at step {began} instead of {whole + 1}")
        where = f"went on from step {whole}" if whole else "began at step 1"
        if began is None and not self.outcome:
            return "killed before its first step"
        return f"{where}, {'ended' if self.outcome else f'reached step {json.loads(lines(samples)[-1])[0]}'}"

    def complete_steps(self) -> list[int]:
        """Steps whose checkpoint is as it was written: proven without the package's own reading of manifests."""
        found = []
        for manifest in (self.run_dir / "checkpoints").glob("step_*/manifest.json"):
            if manifest.parent.name[5:].isdecimal() and intact(manifest):
                found.append(int(manifest.parent.name[5:]))
        return found

    def note_damaged_rows(self, before: bytes, after: bytes) -> None:
        rows, left = before.splitlines(), after.splitlines()
        for i, row in enumerate(rows):
            if i >= len(left) or left[i] != row:
                with contextlib.suppress(ValueError, KeyError):
                    self.unreliable_steps.add(json.loads(row)["step"])

    def compare(self, expected: interruptions.Outcome) -> str:
        """In words, how the ended run differs from one that nothing met; empty if it does not."""
        outcome = self.outcome
        assert outcome is not None
        rows = [
            [row for row in metrics if row["step"] not in self.unreliable_steps]
            for metrics in (outcome.metrics, expected.metrics)
        ]
        exact = self.style != "layouts"
        if outcome.samples != expected.samples:
            return "other samples"
        if [row["step"] for row in rows[0]] != [row["step"] for row in rows[1]]:
            return "metrics of other steps"
        if not all(near(a[k], b[k], exact) for a, b in zip(*rows, strict=True) for k in b):
            return "other metrics"
        if outcome.weights.keys() != expected.weights.keys():
            return "other weights"
        for name, value in expected.weights.items():
            ours = outcome.weights[name]
            if not (torch.equal(ours, value) if exact else torch.allclose(ours, value, rtol=1e-5, atol=1e-5)):
                return f"other weights: {name}"
        return ""


def state(lock: Path) -> str:
    try:
        return "released" if json.loads(lock.read_bytes())["released"] else "unreleased"
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"


def near(a: float, b: float, exact: bool) -> bool:
    return a == b if exact else abs(a - b) <= max(1e-6, 1e-5 * abs(b))


def lines(path: Path) -> list[str]:
    """Complete lines of a file that another process writes."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


def size_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def intact(manifest: Path) -> bool:
    import xxhash

    try:
        entries = json.loads(manifest.read_bytes())
        return bool(entries) and all(
            xxhash.xxh3_128_hexdigest((manifest.parent / name).read_bytes()) == entry["xxh3_128"]
            for name, entry in entries.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def place(folder: Path, style: str) -> Iterator[None]:
    """The disk of a run, in memory where it is to become full."""
    folder.mkdir()
    if "disk" not in style:
        yield
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def can_mount(folder: Path) -> bool:
    (probe := folder / "probe").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", probe], capture_output=True).returncode:
        return False
    subprocess.run(["umount", probe], check=True)
    return True


def soak(models: Path, folder: Path, events: int, seed: int, styles: tuple[str, ...] = STYLES) -> Iterator[Event]:
    """Let `events` happen to as many runs as they take."""
    draw, number, run = random.Random(seed), 0, 0
    if not can_mount(folder):
        print("no right to mount a file system: no disk is filled", flush=True)
        styles = tuple(style for style in styles if "disk" not in style)
    expected: dict[bool, interruptions.Outcome] = {}
    while number < events:
        run, style = run + 1, styles[run % len(styles)]
        by_layout = style == "layouts"
        if by_layout not in expected:
            began = time.monotonic()
            reference = configure(models, folder / f"reference_{by_layout}", "layouts" if by_layout else "sync")
            expected[by_layout] = interruptions.train(reference)
            start_up = 0.6 * (time.monotonic() - began)
        with place(folder / f"{run}", style):
            adversary = Adversary(models, folder / f"{run}", style, draw, start_up)
            for _ in range(min(EVENTS_PER_RUN, events - number)):
                number += 1
                what, outcome = adversary.happen()
                problems, adversary.problems = adversary.problems, []
                yield Event(number, run, style, what, "; ".join([outcome, *problems]), not problems)
                if adversary.outcome:
                    break
            if not adversary.outcome:
                adversary.attempt()
            difference = "; ".join(filter(None, [*adversary.problems, adversary.compare(expected[by_layout])]))
            yield Event(number, run, style, "end", difference or "nothing lost, no difference", not difference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    ranks.PRELOAD = ["torch", "nemo_tsdkd.megatron.train"]
    rows: list[Event] = []
    with tempfile.TemporaryDirectory() as name:
        (models := Path(name, "models")).mkdir()
        tiny_run.prepare(models)
        print(LINE.format("event", "run", "kind of run", "what happens", "what comes of it", "as expected"))
        for row in soak(models, Path(name), args.events, args.seed):
            rows.append(row)
            said = "yes" if row.as_expected else "NO"
            print(LINE.format(row.number, row.run, row.style, row.what, row.outcome, said), flush=True)
    ends, bad = [row for row in rows if row.what == "end"], [row for row in rows if not row.as_expected]
    print(f"{len(rows) - len(ends)} events, {len(ends)} runs to their end, {len(bad)} not as expected")
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(row) for row in rows], indent=1))
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
