"""The speeds that a time estimate assumes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from nemo_tsdkd.config.compose import CONF
from nemo_tsdkd.config.validation import UserError


@dataclass(frozen=True)
class Hardware:
    """A GPU and what connects it; conf/hardware/h100.yaml explains the fields. Units are in their names."""

    memory_gib: float
    flops_per_s: float
    bytes_per_s: float
    kernel_s: float
    nvlink_bytes_per_s: float
    nvlink_latency_s: float
    network_bytes_per_s: float
    network_latency_s: float

    def link(self, *, inside_node: bool) -> tuple[float, float]:
        """(bytes a second, seconds of latency) between GPUs of one node or of several."""
        if inside_node:
            return self.nvlink_bytes_per_s, self.nvlink_latency_s
        return self.network_bytes_per_s, self.network_latency_s

    @classmethod
    def read(cls, path: Path = CONF / "hardware" / "h100.yaml") -> Hardware:
        """The hardware of a YAML file.

        Raises:
            UserError: no such file, or it has not these fields as positive numbers.
        """
        names = [field.name for field in fields(cls)]
        try:
            values = {name: float(value) for name, value in yaml.safe_load(path.read_text()).items()}
        except (OSError, yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
            raise UserError(f"--hardware = {path}: cannot be read ({error}). Copy conf/hardware/h100.yaml.") from None
        if sorted(values) != sorted(names) or min(values.values()) <= 0:
            raise UserError(f"--hardware = {path}: must have exactly {', '.join(names)}, each above 0. Correct it.")
        return cls(**values)
