"""`nemo-tsdkd preflight`: find a bad node in half a minute, before a long job.

Runs one process per rank, as `train` does. Ranks report through a TCP store, so that a rank whose collectives fail can
still report its error, and rank 0 can name the node of a rank that never connects. Exit status: 0 no error, 1 a node
failed, 2 the configuration is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta

from nemo_tsdkd.checks import probes
from nemo_tsdkd.checks.precision import check_engine
from nemo_tsdkd.checks.setup import check_fields, check_files, check_ranks
from nemo_tsdkd.checks.start import check_start
from nemo_tsdkd.config.compose import add_config_arguments, config_from
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.distributed.launch import Launch, environment, hosts
from nemo_tsdkd.reporting.provenance import installed_versions


@dataclass
class Finding:
    """One rank's report to rank 0."""

    host: str
    rank: int
    versions: dict[str, str]
    errors: list[str] = field(default_factory=list)


def main(argv: Sequence[str]) -> None:
    """Check every rank, print each error with its node, and exit with the module's status.

    Raises:
        UserError: the configuration cannot be composed.
    """
    parser = argparse.ArgumentParser(prog="nemo-tsdkd preflight", description="Name the node that would spoil a job.")
    add_config_arguments(parser)
    parser.add_argument("--allow-cpu", action="store_true", help="accept ranks without a GPU")
    parser.add_argument("--deep", action="store_true", help="read the models' weights and compare their digests")
    parser.add_argument("--timeout", type=float, default=120, help="seconds to wait for any rank (default: 120)")
    args = parser.parse_intermixed_args(argv)
    config = config_from(args)
    place = environment()
    check_fields(config)
    check_ranks(config, place.world_size)
    errors = Preflight(config, place, timeout=args.timeout, allow_cpu=args.allow_cpu, deep=args.deep).run()
    for line in errors:
        print(f"preflight: FAILED: {line}", flush=True)
    if not errors and place.rank == 0:
        print(f"preflight: {place.world_size} ranks on {', '.join(hosts())}: all is well", flush=True)
    os._exit(1 if errors else 0)  # destructors would wait for ranks that have ended


class Preflight:
    """The checks in order: each node alone, then the shared file system, then the network."""

    def __init__(
        self, config: TrainConfig, place: Launch, *, timeout: float, allow_cpu: bool, deep: bool = False
    ) -> None:
        self.config, self.place, self.timeout, self.allow_cpu, self.deep = config, place, timeout, allow_cpu, deep
        host = os.environ.get("SLURMD_NODENAME", socket.gethostname())
        self.finding = Finding(host, place.rank, installed_versions())

    def run(self) -> list[str]:
        """Errors: on rank 0 those of all ranks, on other ranks their own or a reference to rank 0's report."""
        from torch.distributed import DistNetworkError, DistStoreError, TCPStore

        address, port = self.place.master_addr, self.place.master_port
        wait = timedelta(seconds=self.timeout)
        try:
            self.store = TCPStore(address, port, is_master=self.place.rank == 0, wait_for_workers=False, timeout=wait)
            return self._groups()
        except (DistNetworkError, DistStoreError, OSError) as error:
            said = " ".join(str(error).split())
            return [f"{self.finding.host} (rank {self.place.rank}): lost rank 0 at {address}:{port}: {said:.200}"]

    def _groups(self) -> list[str]:
        self._try(self._check_node, "node")
        if errors := self._report("node"):
            return errors
        shared = probes.SharedFolder(self.config.run_dir, self.place, self.store, wait=self.timeout / 2)
        self._try(shared.show, "shared folder")
        if errors := self._report("files"):
            return errors
        if self.place.rank == 0:
            self._try(lambda: shared.check_answers(hosts()), "shared folder")
            shared.remove()
        network = probes.Network(self.place, self.config.parallel.gpus_per_node)
        long_timeout = timedelta(seconds=2 * self.timeout)  # torch would abort before our report
        self._try(lambda: network.connect(self.store, long_timeout), "meeting the other ranks")
        self._try(network.inside_node, "all-reduce inside the node")
        self._try(network.over_nodes, "all-reduce over all nodes")
        self._try(network.between_hosts, "all-reduce over gloo")
        return self._report("network")

    def _check_node(self) -> None:
        probes.check_versions()
        probes.check_gpu(self.place, self.config.parallel.gpus_per_node, self.allow_cpu)
        check_engine(self.config)
        if self.place.local_rank == 0:  # the node's other ranks see the same disks
            shapes = check_files(self.config)
            probes.check_gpu_memory(self.config, shapes)
            check_start(self.config, shapes, self.deep)

    def _try(self, check: Callable[[], None], what: str) -> None:
        """Run a check unless an earlier one failed; record its error or its hang."""
        if self.finding.errors:
            return

        def body() -> None:
            try:
                check()
            except Exception as error:  # any error of a driver or a library is this node's error
                self.finding.errors.append(" ".join(f"{what}: {error}".split()))

        thread = threading.Thread(target=body, daemon=True)
        thread.start()
        thread.join(self.timeout)
        if thread.is_alive():
            self.finding.errors.append(f"{what}: hung for {self.timeout:.0f} s")

    def _report(self, stage: str) -> list[str]:
        """Collect all reports on rank 0 and send its verdict to all ranks."""
        store, rank = self.store, self.place.rank
        if rank != 0:
            store.set(f"{stage}/{rank}", json.dumps(asdict(self.finding)))
            store.wait([f"{stage}/verdict"], timedelta(seconds=3 * self.timeout))
            failed = store.get(f"{stage}/verdict") != b"ok"
            store.add(f"{stage}/seen", 1)
            mine = [f"{self.finding.host} (rank {rank}): {e}" for e in self.finding.errors]
            return mine or [f"see rank 0's report, {hosts()[0]}"] * failed
        findings, late = self._collect(stage)
        errors = [*late, *_grouped(findings), *(_version_differences(findings) if stage == "node" else [])]
        store.set(f"{stage}/verdict", "failed" if errors else "ok")
        deadline = time.monotonic() + 10
        while store.add(f"{stage}/seen", 0) < len(findings) - 1 and time.monotonic() < deadline:
            time.sleep(0.02)  # the store ends with this process
        return errors

    def _collect(self, stage: str) -> tuple[list[Finding], list[str]]:
        findings, late = [self.finding], []
        deadline = time.monotonic() + 2 * self.timeout  # a rank may have hung for one timeout before it reports
        for rank in range(1, self.place.world_size):
            key = f"{stage}/{rank}"
            while not self.store.check([key]) and time.monotonic() < deadline:
                time.sleep(0.05)
            if self.store.check([key]):
                findings.append(Finding(**json.loads(self.store.get(key))))
            else:
                node = hosts()[rank // self.config.parallel.gpus_per_node]
                late.append(f"{node} (rank {rank}): no report within {2 * self.timeout:.0f} s")
        return findings, late


def _grouped(findings: list[Finding]) -> list[str]:
    """One line for all ranks of a node with the same error."""
    ranks: dict[tuple[str, str], list[int]] = defaultdict(list)
    for finding in findings:
        for error in finding.errors:
            ranks[finding.host, error].append(finding.rank)
    return [f"{host} (rank {', '.join(map(str, r))}): {error}" for (host, error), r in ranks.items()]


def _version_differences(findings: list[Finding]) -> list[str]:
    """One line for each node and package that differs from rank 0's."""
    first, different = findings[0], set()
    for finding in findings[1:]:
        for package in first.versions.keys() | finding.versions.keys():
            theirs, ours = finding.versions.get(package, "absent"), first.versions.get(package, "absent")
            if theirs != ours:
                different.add(f"{finding.host}: {package} is {theirs}, but {ours} on {first.host}")
    return sorted(different)
