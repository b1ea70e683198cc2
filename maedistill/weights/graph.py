"""An exported graph as a module: it runs on the CPU, in its own number format, and does not train.

b batch   s image side   C outputs
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MOST_NUMBERS = 2**28  # in one tensor of a graph, for one image: 1 GiB in fp32


@dataclass(frozen=True)
class GraphInput:
    """What a graph takes: [b, 3, s, s]. side: s, None if it may vary. pixels: uint8, or else normalised float32."""

    side: int | None
    pixels: bool

    @classmethod
    def of(cls, shape: Sequence[int | None], dtype: torch.dtype | None) -> "GraphInput":
        """Return what a graph takes. Raises ValueError unless it is images, in batches of any number (None)."""
        square = len(shape) == 4 and shape[2] == shape[3]
        if not square or shape[:2] != [None, 3] or dtype not in (torch.float32, torch.uint8):
            text = " x ".join(str(side or "any") for side in shape)
            raise ValueError(f"it takes {text}, not any number of square images of float32 or uint8: any x 3 x s x s")
        return cls(shape[2], dtype == torch.uint8)


class Graph(nn.Module):
    """Runs an exported graph.

    run: [b, 3, s, s] on the CPU -> [b, C]. It is hidden from nn.Module, since no graph moves or changes its mode.
    num_numbers: of its weights. precision: fp32, int8, fp16 or bf16. outside_bytes: of weights in files beside it.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Tensor],
        takes: GraphInput,
        *,
        num_numbers: int,
        precision: str = "fp32",
        outside_bytes: int = 0,
    ) -> None:
        super().__init__()
        self.run, self.takes, self.num_numbers, self.precision = run, takes, num_numbers, precision
        self.outside_bytes = outside_bytes

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return outputs [b, C] of normalised images [b, 3, s, s], or of pixels 0.0 to 255.0, if it takes these."""
        inputs = images.cpu()
        outputs = self.run(inputs.round().to(torch.uint8) if self.takes.pixels else inputs)
        return outputs.to(images.device)
