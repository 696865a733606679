"""How long processes wait for each other: not for ever where they compute in lock-step, for days where the first one works alone."""

CODE = """
import sys, time, datetime
import torch, torch.distributed as distributed
from distill.engines import launch
launch.COMPUTING = datetime.timedelta(seconds=2)
group = launch.waiting_group()
rank, tensor = distributed.get_rank(), torch.ones(1)
if rank == 0:
    time.sleep(6)
distributed.all_reduce(tensor, group=group if sys.argv[1] == "waiting" else None)
sys.stdout.write(f"came {int(tensor)}\\n")  # at once: both processes write to one pipe
"""


def test_a_hung_collective_ends_and_a_waiting_process_waits(fork_server, tmp_path):
    waits, hangs = (fork_server.start("snippet", [CODE, which], folder=tmp_path, ranks=2) for which in ("waiting", "computing"))
    (said, _), (_, complained) = waits.communicate(timeout=120), hangs.communicate(timeout=120)
    assert waits.codes == [0, 0] and said.count("came 2") == 2
    assert hangs.codes[1] != 0 and "imed out" in complained
