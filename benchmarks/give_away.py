"""Weights of a run to give away: in half precision, without what only the run needs.

    python -m benchmarks.give_away IN.pth OUT.pth
"""

from argparse import ArgumentParser
from pathlib import Path

from utils.checkpoint import read_checkpoint, save_checkpoint
from utils.errors import one_line_errors

if __name__ == "__main__":
    with one_line_errors():
        parser = ArgumentParser(description=__doc__.splitlines()[0])
        parser.add_argument("source", metavar="IN.pth")
        parser.add_argument("target", type=Path, metavar="OUT.pth")
        flags = parser.parse_args()
        given = read_checkpoint(flags.source)
        net = {name: weight.half() for name, weight in given["net"].items()}
        save_checkpoint(flags.target, {"net": net, "network": given["network"], "step": given["step"]})
