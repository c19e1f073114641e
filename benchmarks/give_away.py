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
        given = [read_checkpoint(source) for source in flags.sources]
        net = {name: (sum(one["net"][name].float() for one in given) / len(given)).half() for name in given[0]["net"]}
        save_checkpoint(flags.target, {"net": net, "network": given[-1]["network"], "step": given[-1]["step"]})
