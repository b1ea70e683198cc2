"""AMD (Zhao et al., CVPR 2024): the teacher sees more patches than the student; generators predict its other features.

With `by="decoder"` there are no generators: the pixel decoder's rows of hidden patches, which cross-attend to the
visible ones, give the features too, through one linear map per pair of blocks (as in SAMI, Xiong et al., CVPR 2024).

B batch   S, T patches visible to student and teacher   P, Q prefix tokens of student and teacher   D_t teacher width
H hidden patches whose pixels are predicted   W decoder width
"""

from dataclasses import dataclass

from torch import Tensor, nn

from maedistill.data.images.transforms import normalize
from maedistill.methods.dmae import DMAE, AlignmentSpec
from maedistill.methods.mae import BlockFeatures, Losses, PixelSpec, mean_loss
from maedistill.models.decoder import CrossDecoder, Generator, TokenDecoder
from maedistill.models.encoder import Encoder
from maedistill.models.masking import PatchSplit


@dataclass(frozen=True)
class GeneratorSpec:
    """The generators, one per pair of blocks, of teacher width, and the weight of what they predict; 0: none.

    by: `own` generators, or the pixel `decoder`, a `CrossDecoder`; the other fields but the weight are then not used.
    """

    num_heads: int
    depth: int = 2
    weight: float = 1.0
    pos_embed: str = "sincos2d"
    by: str = "own"


class AMD(DMAE):
    """DMAE's terms plus generated alignment: one generator per pair of blocks reads the pair's projected rows.

    With `generate.weight=0` DMAE's terms are all; the teacher may still see more patches than the student.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: TokenDecoder | None,
        *,
        pixels: PixelSpec,
        align: AlignmentSpec,
        generate: GeneratorSpec,
    ) -> None:
        super().__init__(encoder, decoder, pixels=pixels, align=align)
        self.generate = generate
        if not generate.weight:
            self.generators = nn.ModuleList()
            return
        if generate.by == "decoder":
            assert isinstance(decoder, CrossDecoder)
            heads = [nn.Linear(decoder.head.in_features, align.teacher_width) for _ in align.student_taps]
            self.generators = nn.ModuleList(heads)
            return
        self.generators = nn.ModuleList(
            Generator(
                align.teacher_width,
                depth=generate.depth,
                num_heads=generate.num_heads,
                grid=encoder.grid,
                pos_embed=generate.pos_embed,
            )
            for _ in align.student_taps
        )

    def forward(
        self, images: Tensor, split: PatchSplit, target: BlockFeatures | None = None, *more: BlockFeatures
    ) -> Losses:
        """Return DMAE's losses and `generate/BLOCK` per student block. target: {teacher block: [B, Q + T, D_t]}."""
        assert target is not None
        if not self.generate.weight:
            return super().forward(images, split, target, *more)
        if self.generate.by == "decoder":
            pixels, features, generated = self.reconstruct_and_generate(images, split)
            projected = self.project(features)
        else:
            pixels, features = self.reconstruct(images, split, self.student_taps)
            projected = self.project(features)
            own = projected[: len(self.align.student_taps)]
            visible = [rows[:, self.encoder.num_prefix :] for rows in own]  # [B, S, D_t]
            generated = [make(rows, split) for make, rows in zip(self.generators, visible, strict=True)]
        weighted, align = self.alignment_losses(projected, (target, *more), split)
        generate = self.generation_losses(generated, target, split)
        weighted = weighted + self.generate.weight * self.ramp * mean_loss(generate)
        return self.add_pixels(pixels, weighted, {**align, **generate})

    def reconstruct_and_generate(
        self, images: Tensor, split: PatchSplit
    ) -> tuple[Tensor | None, BlockFeatures, list[Tensor]]:
        """Return the pixel loss, the student's tapped features, and what the decoder's rows generate for each pair.

        The loss is None without a weight. A row of a cross-attention decoder does not depend on the others, so the two
        may need different numbers of rows.
        """
        assert self.decoder is not None
        normalized = normalize(images, self.mean, self.std)
        tokens, features = self.encoder(normalized, split.student, taps=self.student_taps)
        predicted = self.num_predicted(split) if self.pixels.weight else 0  # H
        missing = split.num_teacher - split.num_student  # T - S
        hidden = split.hidden[:, : max(predicted, missing)]
        pixels, rows = self.decoder(tokens, split, hidden, num_pixels=predicted)  # [B, H, p*p*3], [B, max(H, T - S), W]
        loss = self.pixel_loss(pixels, images, normalized, hidden[:, :predicted]) if predicted else None
        return loss, features, [head(rows[:, :missing]) for head in self.generators]

    def generation_losses(self, generated: list[Tensor], target: BlockFeatures, split: PatchSplit) -> Losses:
        """Return the generated alignment of each pair at patches that only the teacher sees: rows [B, T - S, D_t]."""
        start = self.align.teacher_prefix + split.num_student
        pairs = zip(self.align.student_taps, self.align.teacher_taps, generated, strict=True)
        return {f"generate/{s}": self.align.compare(rows, target[t][:, start:]) for s, t, rows in pairs}
