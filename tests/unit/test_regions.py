"""The helper that judges regions judges right: each thing that a CUDA graph cannot repeat is found, and what is
recorded replays."""

import pytest
import torch
from regions import CpuCapture, Recorder, differences

STILL = torch.arange(6.0)
COUNT = torch.zeros(1, dtype=torch.int64)


def fine(step):
    STILL.masked_fill(STILL > 3, torch.nan)
    out = torch.empty(3)
    out.copy_(STILL[:3] * 2 + 1)
    COUNT.add_(1)


def item(step):
    STILL.sum().item()


def branch(step):
    if STILL[0] > 7:
        fine(step)


FAULTY = {
    "host read: tolist": lambda step: STILL.tolist(),
    "host read: item": item,
    "host read: __bool__": branch,
    "host value: lift_fresh": lambda step: STILL + torch.tensor([1.0, 2, 3, 4, 5, 6]),
    "shape by data: nonzero": lambda step: STILL.nonzero(),
    "shape by data: mask": lambda step: STILL[STILL > 2],
    "moved": lambda step: KEEP[step] + 1,
    "became": lambda step: STILL[: 3 + step] + 1,
    "operators became": lambda step: [STILL + 1 for _ in range(1 + step)],
    "('0',)": lambda step: STILL * step,
}
KEEP = [torch.zeros(3), torch.zeros(3)]


def recorded(region, step):
    with Recorder() as recorder:
        region(step)
    return recorder


def test_a_region_that_repeats_is_clean():
    assert not differences(recorded(fine, 0), recorded(fine, 1))


@pytest.mark.parametrize("fault", FAULTY)
def test_each_fault_is_found(fault):
    found = differences(recorded(FAULTY[fault], 0), recorded(FAULTY[fault], 1))
    assert any(fault in line for line in found), found


def test_a_mask_that_torch_fills_by_is_no_fault():
    def fill(step):
        x = STILL.clone()
        x[x > 2] = 0.0

    assert not differences(recorded(fill, 0), recorded(fill, 1))


def test_a_capture_changes_nothing_and_each_replay_reads_and_writes_where_the_region_did():
    given, sums, seen = torch.tensor([1.0, 2.0]), torch.zeros(2), torch.zeros(3, 2)
    place, inner = torch.zeros(1, dtype=torch.int64), []

    def region():
        inner.append(given * 10)
        sums.add_(inner[-1])
        seen.index_copy_(0, place, sums[None])
        place.add_(1)

    capture = CpuCapture()
    replay = capture(region)
    assert sums.tolist() == [0, 0] and place.item() == 0 and not seen.any()
    replay()
    given.copy_(torch.tensor([3.0, 4.0]))
    replay()
    assert seen.tolist() == [[10, 20], [40, 60], [0, 0]]
    assert inner[0].isnan().all() and len(inner) == 1, "what a region made is worthless outside of it"
    assert (capture.captures, capture.replays) == (1, 2)
