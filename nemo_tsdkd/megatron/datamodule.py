"""Samples for NeMo: Megatron's sampler gives each data-parallel rank its share and counts consumed samples."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import xxhash
from nemo.lightning.megatron_parallel import MegatronStep
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from torch.utils.data import DataLoader

from nemo_tsdkd.config.integers import ceil_div
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.config.validation import UserError
from nemo_tsdkd.data.dataset import EpochOrder, PromptDataset, Sample


def as_list(samples: list[Sample]) -> list[Sample]:
    """Collate nothing: sequences are padded once their responses are known (`data/batch.py`)."""
    return samples


class SampleSampler(MegatronDataSampler):
    """Megatron's sampler, which hands out `micro_batch_size` samples at a time, for a schedule of its own number of
    micro-batches: how many a global batch is cut into is known once its responses are."""

    num_micro_batches: int  # micro-batches of the step that begins, equal on all ranks; the strategy sets it

    def on_megatron_step_start(self, step: MegatronStep) -> MegatronStep:
        return replace(super().on_megatron_step_start(step), num_microbatches=self.num_micro_batches)


class SampleModule(pl.LightningDataModule):
    """A LightningDataModule over `EpochOrder`; batches are lists of `Sample`."""

    def __init__(self, dataset: PromptDataset, config: TrainConfig) -> None:
        super().__init__()
        self.dataset = dataset
        self.config = config
        self.seq_length = config.data.seq_length  # NeMo reads these three
        self.micro_batch_size = config.micro_batch_size
        self.global_batch_size = config.global_batch_size
        self.data_sampler = SampleSampler(
            seq_len=self.seq_length,
            micro_batch_size=self.micro_batch_size,
            global_batch_size=self.global_batch_size,
            output_log=False,
        )

    def train_dataloader(self) -> DataLoader:
        config = self.config
        self.data_sampler.init_global_step = self.trainer.global_step  # consumed samples count from the resume on
        # Lightning counts a resumed run's steps from the start but measures the loader from where it resumes:
        # twice the samples keep the epoch from ending early; max_steps ends the run.
        total = 2 * config.max_steps * config.global_batch_size
        order = EpochOrder(
            self.dataset, total, config.seed, block=config.global_batch_size, repeats=config.rollout.reuse
        )
        return DataLoader(order, collate_fn=as_list)

    def epoch(self, step: int) -> float:
        """Passes over the data after `step` steps; a set of rollouts that is reused was drawn once."""
        drawn = ceil_div(step, self.config.rollout.reuse) * self.global_batch_size
        return drawn / len(self.dataset)

    def reconfigure_limit_batches(self) -> None:
        """NeMo calls it to convert validation batches to micro-batches; there is no validation loop here."""

    def state_dict(self) -> dict[str, Any]:
        steps = self.trainer.global_step - self.data_sampler.init_global_step
        return {"consumed_samples": self.data_sampler.compute_consumed_samples(steps), "order": self._order()}

    def _order(self) -> dict[str, int | str]:
        """What the order of samples depends on, by configuration field; 64 prompts represent the data."""
        rows = len(self.dataset)
        some = [self.dataset[i * rows // 64].prompt_ids for i in range(64)]
        return {
            "global_batch_size": self.config.global_batch_size,
            "seed": self.config.seed,
            "rollout.reuse": self.config.rollout.reuse,
            "data.path": f"{rows} rows, xxh3 {xxhash.xxh3_64_hexdigest(repr(some).encode())}",
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume at the checkpoint's number of consumed samples.

        Raises:
            UserError: on every rank, if samples would come in another order or from other data.
        """
        for field, value in self._order().items():
            if value != state["order"][field]:
                raise UserError(
                    f"{field} = {value}: this run began with {state['order'][field]}, and a resumed run keeps its "
                    "order of samples. Give the same value, or start another run_dir from this one's export."
                )
        self.data_sampler.init_consumed_samples = state["consumed_samples"]
        self.data_sampler.prev_consumed_samples = state["consumed_samples"]
        self.data_sampler.if_first_step = 1
