"""Weights to give away: one run's, or the mean of runs that went on from one another; in half precision.

    python -m benchmarks.give_away IN.pth [IN.pth ...] OUT.pth
"""

from argparse import ArgumentParser
from pathlib import Path

from utils.checkpoint import read_checkpoint, save_checkpoint
from utils.errors import one_line_errors

if __name__ == "__main__":
    with one_line_errors():
        parser = ArgumentParser(description=__doc__.splitlines()[0])
        parser.add_argument("sources", nargs="+", metavar="IN.pth")
        parser.add_argument("target", type=Path, metavar="OUT.pth")
        flags = parser.parse_args()
        runs = [read_checkpoint(source) for source in flags.sources]
        net = {k: (sum(run["net"][k].float() for run in runs) / len(runs)).half() for k in runs[0]["net"]}
        save_checkpoint(flags.target, {"net": net, "network": runs[-1]["network"], "step": runs[-1]["step"]})
