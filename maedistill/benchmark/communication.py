"""What data-parallel training costs on paper: how long ranks exchange gradients, beside what they compute.

    parameters -> gradient bytes -> ring all-reduce at a bandwidth -> seconds, added to those of the computation

A model, not a measurement. What it assumes:
- every gradient is a number of 4 bytes, as the engine reduces them, whatever the number format of the step;
- a ring: each rank sends and receives 2 (K - 1) / K times all of them; 3 (K - 1) / K with ZeRO stage 3, which gathers
  the weights twice, and scatters the gradients;
- all that at `BANDWIDTH` per rank: what one 200 Gbit/s network port per GPU brings. Links inside a machine are faster,
  but a ring is as fast as its slowest link, and beyond one machine that is the network;
- once per update, after the backward pass and beside nothing. The engine overlaps the two, so this is an upper bound;
- no latency, no rank that is slower than the others, no file system: what large clusters lose on top.
"""

from dataclasses import dataclass

BANDWIDTH = 25e9  # bytes per second and rank, in each direction
FLOPS = 250e12  # floating-point operations per second of a GPU that nobody measured


@dataclass(frozen=True)
class AnalyticModel:
    """One size of a cluster: seconds of a step by what they are spent on, and what follows."""

    ranks: int
    images: int  # per rank and update
    compute: float
    reduce: float

    @property
    def efficiency(self) -> float:
        """Of so many ranks, against ranks that need not talk."""
        return self.compute / (self.compute + self.reduce)

    @property
    def images_per_second(self) -> float:
        """Of all ranks together."""
        return self.ranks * self.images / (self.compute + self.reduce)


def on_paper(
    ranks: int, *, images: int, images_per_second: float, parameters: int, zero: int, bandwidth: float = BANDWIDTH
) -> AnalyticModel:
    """The model above for `ranks` ranks.

    images: per rank and update. images_per_second: of one rank by itself. zero: the ZeRO stage.
    """
    return AnalyticModel(
        ranks, images, images / images_per_second, reduce_seconds(ranks, parameters, zero=zero, bandwidth=bandwidth)
    )


def reduce_seconds(ranks: int, parameters: int, *, zero: int, bandwidth: float = BANDWIDTH) -> float:
    """How long `ranks` ranks take to exchange the gradients of `parameters` numbers."""
    passes = 3 if zero == 3 else 2
    return passes * (ranks - 1) / ranks * 4 * parameters / bandwidth
