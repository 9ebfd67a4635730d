"""`nemo-tsdkd import` and `nemo-tsdkd export`: conversions between Hugging Face and NeMo folders.

NeMo is imported inside the functions: bad input is told at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nemo_tsdkd.checkpoints.atomic import atomic_folder, detect_full_disk, require_creatable
from nemo_tsdkd.checkpoints.best import BEST, best_checkpoint
from nemo_tsdkd.checkpoints.completeness import require_complete
from nemo_tsdkd.checkpoints.foreign import require_safe
from nemo_tsdkd.checkpoints.manifest import CHECKPOINTS, add_manifest, find_damage, has_manifest, newest_complete
from nemo_tsdkd.checkpoints.model_folder import HF_ASSETS, is_nemo_checkpoint, require_importable
from nemo_tsdkd.config.validation import UserError
from nemo_tsdkd.distributed import launch
from nemo_tsdkd.distributed.output import redirect_library_output


def import_main(argv: Sequence[str] | None = None) -> None:
    """`nemo-tsdkd import --source HF --output DIR`: a Hugging Face folder to a NeMo checkpoint. Several ranks (srun,
    torchrun) hold and write a share of the model each."""
    place = launch.environment()
    parser = argparse.ArgumentParser(prog="nemo-tsdkd import", description=import_main.__doc__)
    parser.add_argument("--source", type=Path, required=True, help="local Hugging Face folder with safetensors")
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    args = parser.parse_args(argv)
    if args.source.is_dir():
        require_safe(args.source)
    require_importable(args.source)
    if has_manifest(args.source) and (damage := find_damage(args.source)):
        raise UserError(f"--source = {args.source}: {damage}. Export or copy the model again.")
    require_complete(args.source)
    _require_new(args.output)
    with _output(args.output) if place.rank == 0 else _no_output(args.output, place.rank) as folder:
        from nemo_tsdkd.megatron.checkpoints.convert import import_hf

        import_hf(args.source, folder)
    if place.rank == 0:
        print(args.output)


def export_main(argv: Sequence[str] | None = None) -> None:
    """`nemo-tsdkd export --checkpoint DIR --to hf|nemo --output DIR`: the student of a run, or of one checkpoint."""
    parser = argparse.ArgumentParser(prog="nemo-tsdkd export", description=export_main.__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help=_CHECKPOINT)
    parser.add_argument("--to", choices=("hf", "nemo"), required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    args = parser.parse_args(argv)
    checkpoint = _checkpoint_in(args.checkpoint)
    with _output(args.output) as folder:
        from nemo_tsdkd.megatron.checkpoints.convert import export_hf, export_nemo

        (export_hf if args.to == "hf" else export_nemo)(checkpoint, folder)
    print(args.output)


_CHECKPOINT = (
    "a run's folder (its newest complete checkpoint), RUN/best (the one with the best validation) or a checkpoint"
)


@contextmanager
def _output(target: Path) -> Iterator[Path]:
    """The folder to fill, which appears as `target` with its manifest; libraries speak into `target`.log, which stays
    where the work fails.

    Raises:
        UserError: `target` exists or cannot be made.
        OSError: its disk is full.
    """
    _require_new(target)
    log = target.with_name(f"{target.name}.log")
    with redirect_library_output(log), atomic_folder(target) as folder, detect_full_disk(folder):
        yield folder
        add_manifest(folder)
    log.unlink(missing_ok=True)


@contextmanager
def _no_output(target: Path, rank: int) -> Iterator[None]:
    """What `_output` is to rank 0, for another rank, which fills the folder of rank 0."""
    log = target.with_name(f"{target.name}.{rank}.log")
    with redirect_library_output(log):
        yield None
    log.unlink(missing_ok=True)


def _require_new(target: Path) -> None:
    if target.exists():
        raise UserError(f"--output = {target}: must not exist. Remove it or choose another folder.")
    require_creatable("--output", target)


def _best_of_run(run_dir: Path) -> Path:
    best = best_checkpoint(run_dir)
    if best is None:
        raise UserError(
            f"--checkpoint = {run_dir / BEST}: no complete checkpoint of {run_dir} has a validation. Give the run's "
            "folder, or train with validation.path and checkpoint.keep_best=true."
        )
    return best[0]


def _checkpoint_in(folder: Path) -> Path:
    """The checkpoint itself, the newest complete one of a run folder, or its best. A run's checkpoint must match its
    manifest."""
    folder = _best_of_run(folder.parent) if folder.name == BEST and not folder.exists() else folder
    checkpoint = folder if is_nemo_checkpoint(folder) else newest_complete(folder)
    if checkpoint is None:
        raise UserError(f"--checkpoint = {folder}: no complete checkpoint in it. Give a run folder or NeMo checkpoint.")
    resolved = folder.resolve()
    of_a_run = has_manifest(folder) or (resolved.parent.name == CHECKPOINTS and resolved.name.startswith("step_"))
    if of_a_run and (damage := find_damage(folder)):
        raise UserError(f"--checkpoint = {folder}: {damage}. Choose another checkpoint of the run.")
    require_safe(checkpoint)
    if not (checkpoint / HF_ASSETS).is_dir():
        raise UserError(
            f"--checkpoint = {checkpoint}: not written by nemo-tsdkd. Export it with NeMo's llm.export_ckpt."
        )
    return checkpoint
