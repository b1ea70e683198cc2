"""An analytic model of data-parallel training: the time to exchange gradients beside the time to compute them.

    parameters -> gradient bytes -> ring all-reduce at a bandwidth -> seconds, added to those of the computation

This is a model, not a measurement. It assumes:
- Each gradient takes 4 bytes, as the engine reduces them, whatever the number format of the step.
- Ranks form a ring. Each of K ranks sends and receives 2 (K - 1) / K times the gradients, or 3 (K - 1) / K times with
  ZeRO stage 3, which gathers the weights twice and scatters the gradients.
- Each rank transfers at `BANDWIDTH`, the speed of one 200 Gbit/s network port per GPU. Links inside a machine are
  faster, but a ring is as fast as its slowest link, which is the network as soon as there are two machines.
- The exchange happens once per update, after the backward pass, without overlap. The engine overlaps the two, so the
  modelled time is an upper bound.
- Latency, stragglers and the file system cost nothing. Large clusters lose time to these as well.
"""

from dataclasses import dataclass

BANDWIDTH = 25e9  # bytes per second and rank, in each direction
FLOPS = 250e12  # floating-point operations per second assumed for a GPU that was not measured


@dataclass(frozen=True)
class AnalyticModel:
    """The modelled step of a cluster of one size: seconds of computation and of exchange, and the resulting speed."""

    ranks: int
    images: int  # per rank and update
    compute: float
    reduce: float

    @property
    def efficiency(self) -> float:
        """Return the speed relative to the same number of ranks without communication."""
        return self.compute / (self.compute + self.reduce)

    @property
    def images_per_second(self) -> float:
        """Return the speed of all ranks together."""
        return self.ranks * self.images / (self.compute + self.reduce)


def on_paper(
    ranks: int, *, images: int, images_per_second: float, parameters: int, zero: int, bandwidth: float = BANDWIDTH
) -> AnalyticModel:
    """Apply the model above to `ranks` ranks.

    images: images per rank and update. images_per_second: speed of one rank by itself. zero: the ZeRO stage.
    """
    return AnalyticModel(
        ranks, images, images / images_per_second, reduce_seconds(ranks, parameters, zero=zero, bandwidth=bandwidth)
    )


def reduce_seconds(ranks: int, parameters: int, *, zero: int, bandwidth: float = BANDWIDTH) -> float:
    """Return the seconds that `ranks` ranks take to exchange the gradients of `parameters` numbers."""
    passes = 3 if zero == 3 else 2
    return passes * (ranks - 1) / ranks * 4 * parameters / bandwidth
