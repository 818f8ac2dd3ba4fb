"""Training on several processes: all ranks keep the same units, bits and weights, those of one process."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import graphcomp as gc
from graphcomp.training import loop
from tests.processes import NEEDS_GLOO, in_two

STEPS, BATCH = 14, 16


class Net(nn.Module):
    """Without batch norm, whose statistics are those of one process."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.GroupNorm(1, 12)
        self.conv2 = nn.Conv2d(12, 16, 3, stride=2)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv1(x)))
        return self.head(torch.relu(self.conv2(x)).mean((2, 3)))


def data():
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(BATCH, 3, 8, 8, generator=generator), torch.randint(0, 5, (BATCH,), generator=generator))
        for _ in range(STEPS)
    ]


def train(wrap, rank=0, ranks=1):
    """Weights, bits and units after a schedule, on this rank's share of each batch."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    ready = gc.prepare(Net().double(), data()[0][0][:4].double(), bits=(4, 8), prune=("channel", "width", "hidden"))
    ready.train()
    schedule = gc.Schedule(STEPS, warmup=2, projection=3, joint=5, projection_periods=3, pruning_periods=2)
    optimizer = gc.QASSO(ready, torch.optim.AdamW, lr=1e-3, lr_quant=1e-3, sparsity=0.4, schedule=schedule)
    model = wrap(ready)
    for x, y in data():
        share = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
        optimizer.zero_grad()
        F.cross_entropy(model(x[share].double()), y[share]).backward()
        optimizer.step()
    weights = {name: p.detach() for name, p in ready.named_parameters()}
    units = {group.name: units for group, units in ready.kept().items()}
    return weights, optimizer.bank.bits(), units, optimizer.removed


def _rank(rank, _folder):
    return train(nn.parallel.DistributedDataParallel, rank, 2)


@pytest.mark.slow
@pytest.mark.ci
@NEEDS_GLOO
def test_two_processes_train_the_model_that_one_trains(tmp_path):
    first, second = in_two(_rank, tmp_path)
    alone = train(lambda module: module)
    for name, weight in first[0].items():
        assert torch.equal(weight, second[0][name]), name  # ranks agree bit for bit
        assert torch.allclose(weight, alone[0][name], rtol=1e-6, atol=1e-9), name
    assert torch.equal(first[1], second[1])
    assert torch.allclose(first[1], alone[1], atol=1e-6)
    for name, units in alone[2].items():
        assert torch.equal(first[2][name], units) and torch.equal(second[2][name], units)
    assert first[3] == second[3] == alone[3] > 0


# ------------------------------------------------------------------------------------------------ compress
class Stopped(Exception):
    """Stands for whatever ends the processes."""


def loss(output, batch):
    return F.cross_entropy(output, batch[1])


def shares(rank, ranks):
    share = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    return [(x[share], y[share]) for x, y in data()]


def compressed(rank=0, ranks=1, *, loss=loss, dropout=0.0, batches=None, double=False, **options):
    """Of a net whose weights differ from process to process at first, on this rank's share of each batch."""
    torch.manual_seed(rank)
    net = nn.Sequential(Net(), nn.Dropout(dropout)).train()
    batches = shares(rank, ranks) if batches is None else batches
    if double:
        net, batches = net.double(), [(x.double(), y) for x, y in batches]
    training = gc.Training(optimizer=torch.optim.AdamW, steps=28, **options.pop("training", {}))
    options = {"prune": ("channel", "width", "hidden"), **options}
    return gc.compress(net, batches[0][0][:4], data=batches, loss=loss, training=training, progress=False, **options)


def _compress_rank(rank, folder):
    loop.SHRINK_FROM = 2
    whole, cut_short = folder / "whole", folder / "cut short"
    calls = []

    @functools.wraps(loss)  # a run goes on with the same loss
    def stopping(output, batch):
        calls.append(1)
        if len(calls) > 45:  # in the cool-down, where units are cut out
            raise Stopped
        return loss(output, batch)

    def bad_in_one(output, batch):
        return loss(output, batch) * (float("nan") if rank == 1 else 1.0)

    options = {"bits": (4, 8), "dropout": 0.3, "training": {"folder": whole, "save_every": 4, "accumulate": 2}}
    first = compressed(rank, 2, **options).state_dict()
    options["training"] = options["training"] | {"folder": cut_short}
    with pytest.raises(Stopped):
        compressed(rank, 2, loss=stopping, **options)
    resumed = compressed(rank, 2, **options).state_dict()
    plain = compressed(rank, 2, double=True, bits=None, method="hesso").state_dict()
    steps = compressed(rank, 2, bits=4, activation_bits=8, method="qat", prune=None).state_dict()
    with pytest.raises(gc.TrainingError, match="the loss is nan at step 1 of"):
        compressed(rank, 2, bits=8, loss=bad_in_one)
    with pytest.raises(gc.PlanError, match="14 in process 0, 13 in process 1"):
        compressed(rank, 2, bits=8, batches=shares(rank, 2)[rank:])
    with pytest.raises(gc.CheckpointError, match="another run"):  # the first process finds it, and tells
        compressed(rank, 2, **(options | {"sparsity": 0.3}))
    return [first, resumed, plain, steps]


@pytest.mark.slow
@pytest.mark.ci
@NEEDS_GLOO
def test_compress_in_two_processes(tmp_path, monkeypatch):
    """Both return the same model, one writes the folder, and a run that was cut short goes on bit for bit."""
    monkeypatch.setattr(loop, "SHRINK_FROM", 2)
    first, second = in_two(_compress_rank, tmp_path)
    for mine, other in zip(first, second, strict=True):
        assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)
    run, resumed, plain, _ = first
    assert run.keys() == resumed.keys() and all(torch.equal(run[name], resumed[name]) for name in run)
    alone = compressed(double=True, bits=None, method="hesso").state_dict()
    for name, tensor in alone.items():
        assert torch.allclose(plain[name], tensor, rtol=1e-6, atol=1e-9), name
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len({line.partition(",")[0] for line in lines})
    with pytest.raises(gc.CheckpointError, match="processes: 2 there, None now"):
        compressed(bits=(4, 8), training={"folder": tmp_path / "whole", "accumulate": 2})


@NEEDS_GLOO
def test_a_sharded_module_is_refused():
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ready = gc.prepare(
            Net(), data()[0][0][:4], bits=None
        )  # of the steps of quantizers torch itself says that it shards no scalars
        fully_shard(ready, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        with pytest.raises(gc.PlanError, match="DistributedDataParallel"):
            gc.QASSO(ready, torch.optim.SGD, lr=0.1, schedule=20)
    finally:
        dist.destroy_process_group()
