"""The part of torch.distributed that the program needs: no-ops in a single process.

`torchrun` starts the processes and sets RANK, LOCAL_RANK and WORLD_SIZE. Each has the encoder and the frozen base, or a part
of the base (base_model/sharding.py), and trains on its share of every step's rows. Rank 0, `main`, prints and writes. The
ranks exchange:

    in each optimizer step   numbers of labels, tokens and passes, and signals   training/steps.py
                             the gradient of the prefix, and the loss            training/loop.py
    in each evaluation       before each pass: are rows left, and signals        evaluation.py
                             at the end: sums of losses, and answers             evaluation.py
    with a sharded base      weights, in every pass                              base_model/sharding.py
    for each checkpoint      a checksum of the weights, which must be equal      training/checkpoints.py
    at the start             the path of the checkpoint to resume from           training/checkpoints.py
                             a teacher's answers to rows that have none          training/teacher.py
"""

import datetime
import gc
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import torch
import torch.distributed as dist

GRACE = 5  # seconds that torchrun gets to kill this process after a peer has died
TIMEOUT = datetime.timedelta(hours=3)  # for one exchange: one process may prepare many rows while the others wait


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def note(line: str) -> None:
    """Prints a line to stderr, in main only."""
    if is_main():
        print(line, file=sys.stderr, flush=True)


def torchrun_job() -> str | None:
    """A name for this torchrun, the same after it has restarted its processes; None without torchrun.

    Without it, a run that torchrun restarts would be refused, because its folder already holds its own checkpoints.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # in the folder of its logs: .../JOB/attempt_N/LOCAL_RANK/error.json
    return Path(file).parents[2].name if file else None


_store: dist.Store | None = None  # shared by the processes of this run, once they are connected


def first_to_say(message: str) -> bool:
    """Whether this is the first process with this message since torchrun (re)started them. Otherwise 8 print it 8 times."""
    global _store
    # Before the processes are connected, torchrun may have a store that outlives them.
    if _store is None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        _store, *_ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    try:
        return _store is None or _store.add(f"{os.environ['TORCHELASTIC_RESTART_COUNT']}: {message}", 1) == 1
    except dist.DistError:  # the store was in main, and main has ended
        return True


@contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """A context in which this process is connected to the others that torchrun has started, and only main prints to stdout.

    gloo exchanges tensors on the CPU, nccl tensors on CUDA.
    """
    global _store
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _store, number, total = next(dist.rendezvous("env://", timeout=TIMEOUT))
    one_machine, kept = os.environ["GROUP_WORLD_SIZE"] == "1", os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True"
    # After a restart, the store still holds the addresses of dead processes. Several machines do not count restarts alike.
    if one_machine:
        _store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", _store)
    elif kept and number == 0 and os.environ["TORCHELASTIC_MAX_RESTARTS"] != "0":
        print("a restart may hang; against that, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun", file=sys.stderr)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT, store=_store, rank=number, world_size=total)
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(sys.stdout if is_main() else nowhere):
            yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo/transport" in str(error)):
            raise
        # The peer that died says why. On the same machine, torchrun kills this process before it prints the line below.
        time.sleep(GRACE)
        print(f"process {number}: has lost another process of this run, which says why it ended", file=sys.stderr)
        sys.exit(1)
    finally:
        # If a sharded model still held the process group, the end of the process would be an abort.
        gc.collect()
        dist.destroy_process_group()


@contextmanager
def local_main_first() -> Iterator[None]:
    """A context that one process per machine runs first; the others then find its result in a cache."""
    waits = os.environ.get("LOCAL_RANK", "0") != "0"
    if waits:
        barrier()
    yield
    if not waits:
        barrier()


def barrier() -> None:
    max_over_ranks(0)


def share(values: Sequence) -> Sequence:
    """This rank's part of `values`, which all ranks have: every world_size-th, from index rank on."""
    return values[rank() :: world_size()]


def all_sum(*tensors: torch.Tensor) -> None:
    """Sums tensors of one dtype over all ranks, in place, in one all-reduce. All ranks get the same bits."""
    if dist.is_initialized():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


def sum_over_ranks(numbers: list[float]) -> list[float]:
    """Each number summed over all ranks, in float64. It is done on the CPU, so that nothing waits for a GPU."""
    tensor = torch.tensor(numbers, dtype=torch.float64)
    all_sum(tensor)
    return tensor.tolist()


def max_over_ranks(number: int) -> int:
    """The largest of the ranks' numbers."""
    tensor = torch.tensor(number)
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def gather_numbers(numbers: Sequence[int]) -> list[list[int]]:
    """The numbers of each rank, in the order of ranks, by one all-reduce on the CPU. All ranks give equally many."""
    table = torch.zeros(world_size(), len(numbers), dtype=torch.int64)
    table[rank()] = torch.tensor(numbers)
    all_sum(table)
    return table.tolist()


def gather(value) -> list:
    """The value of each rank, in the order of ranks: anything that JSON knows. torch's all_gather_object would unpickle."""
    if not dist.is_initialized():
        return [value]
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).long()
    lengths = [length for (length,) in gather_numbers([len(content)])]
    parts = [torch.zeros(length, dtype=torch.int64) for length in lengths]
    parts[rank()] = content
    joined = torch.cat(parts)
    all_sum(joined)
    return [json.loads(bytes(text.tolist())) for text in joined.to(torch.uint8).split(lengths)]


def gather_shares(values: list) -> list:
    """The values of all ranks in one order, the inverse of `share`: anything that JSON knows."""
    parts = gather(values)
    together = [None] * sum(map(len, parts))
    for process, part in enumerate(parts):
        together[process :: len(parts)] = part
    return together


def broadcast_object(value):
    """Main's value, in all ranks: anything that JSON knows."""
    return gather(value if is_main() else None)[0]


def check_equal(tensors: list[torch.Tensor], what: str) -> None:
    """Raises RuntimeError unless all ranks have the same bits. It compares sums of the bits, taken as integers."""
    sums = [int(tensor.detach().contiguous().view(torch.int32).sum(dtype=torch.int64)) for tensor in tensors]
    if len({tuple(other) for other in gather(sums)}) > 1:
        raise RuntimeError(f"the processes no longer have the same {what}")
