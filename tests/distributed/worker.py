"""One of several processes: runs every check on all of them, and has the first write down what each found."""

import faulthandler
import json
import sys
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

faulthandler.dump_traceback_later(280, exit=True)
modules_before = set(sys.modules)
import fastnn  # noqa: E402

FASTNN_BROUGHT = set(sys.modules) - modules_before


def importing_fastnn_leaves_dtensor_alone():
    assert "torch.distributed.tensor" not in FASTNN_BROUGHT and "fastnn.distributed.ring" in FASTNN_BROUGHT


def main(path: str) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    fastnn.set_fallback("error")  # a call that no kernel takes would be torch's against torch's
    from tests.distributed import rings, strategies, wrappers

    checks = [importing_fastnn_leaves_dtensor_alone, *strategies.CHECKS, *rings.CHECKS, *wrappers.CHECKS]
    for check in checks:
        torch.manual_seed(0)
        try:
            check()
            error = ""
        except Exception:
            error = f"on process {dist.get_rank()}: {traceback.format_exc()}"
        errors: list = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        if dist.get_rank() == 0:
            with open(path, "a") as results:
                print(json.dumps([check.__name__, "".join(errors)]), file=results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
