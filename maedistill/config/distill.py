"""The schema of distillation in fine-tuning: teachers, and one section for each term, with a teacher or without.

Every term is off by default (weight 0) and has its own schedule; any number of terms can be combined. Depths of
networks count from 0: a ViT's blocks, a convolutional network's stages as timm has them (ResNet: 0 the stem, 1 to 4
its layers). Rules between the keys are in `distill_rules.py`.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from maedistill.config.schema import (
    Above0,
    Count,
    Positive,
    Precision,
    Probability,
    Section,
    Side,
    Weight,
    result,
    runtime,
)

Temperature = Annotated[float, Field(ge=0.01, le=1000)]  # outside this range, softmax is one-hot or uniform
# Terms that relate the images of a micro-batch.
BATCH_RELATION_TERMS = ("rkd_distance", "rkd_angle", "similarity_preserving", "pkt", "contrastive")


class TermConfig(Section):
    """Weight and schedule of a term.

    weight |        ______________
           |       /              |
         0 |______/               |______
            start  +warmup       stop     epochs
    """

    needs_teacher: ClassVar[bool] = True

    weight: Weight = result(0.0, "weight of the term; 0: off")
    start_epoch: Weight = result(0.0, "epoch in which the term begins")
    warmup_epochs: Weight = result(0.0, "linear warm-up of the weight from start_epoch on; 20 in DKD's paper")
    stop_epoch: Above0 | None = result(
        None, "epoch in which the term ends (early-stopped KD, Cho & Hariharan, 2019); null: never"
    )

    @property
    def on(self) -> bool:
        """Return whether the term is on."""
        return self.weight > 0

    @property
    def is_scheduled(self) -> bool:
        """Return whether the weight changes over time."""
        return bool(self.start_epoch or self.warmup_epochs) or self.stop_epoch is not None

    def weight_at(self, epoch: float) -> float:
        """Return the weight in the step that begins after `epoch` epochs."""
        if epoch < self.start_epoch or (self.stop_epoch is not None and epoch >= self.stop_epoch):
            return 0.0
        if epoch >= self.start_epoch + self.warmup_epochs:
            return self.weight
        return self.weight * (epoch - self.start_epoch) / self.warmup_epochs

    def describe_schedule(self) -> str:
        """Return a summary: `9 from epoch 5, warm-up 20, to epoch 100`."""
        start = f" from epoch {self.start_epoch:g}" if self.start_epoch else ""
        warmup = f", warm-up {self.warmup_epochs:g}" if self.warmup_epochs else ""
        stop = f", to epoch {self.stop_epoch:g}" if self.stop_epoch is not None else ""
        return f"{self.weight:g}{start}{warmup}{stop}"


class PairsConfig(TermConfig):
    """A term on features of depths, paired between student and teacher."""

    student: tuple[Count, ...] = result((), "0-based student blocks")
    teacher: tuple[Count, ...] = result((), "0-based teacher depths, one per student block")

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Return the pairs (student depth, teacher depth)."""
        return list(zip(self.student, self.teacher, strict=True))


class LogitsConfig(TermConfig):
    """Hinton's KD: the student's softened predictions imitate the teacher's; needs no labels."""

    weight: Weight = result(
        0.0,
        "weight of T^2 KL(teacher, student); 0.9 with label_weight=0.1 or 1 in KD, 9 when standardised; 0: off",
    )
    temperature: Temperature = result(4.0, "temperature T; 4 on small data, 1 on ImageNet, 2 when standardised")
    standardize: bool = result(False, "Z-score both sides' logits per image first (logit standardisation, Sun 2024)")


class DKDConfig(TermConfig):
    """DKD: alpha TCKD (confidence in the label) + beta NCKD (the other classes), each logged; needs labels."""

    weight: Weight = result(0.0, "weight of alpha TCKD + beta NCKD; 1 in DKD, 9 when standardised; 0: off")
    alpha: Weight = result(1.0, "weight of TCKD; 1 in DKD")
    beta: Weight = result(8.0, "weight of NCKD; 8 on CIFAR, 0.5 on ImageNet in DKD")
    temperature: Temperature = result(4.0, "temperature; 4 on CIFAR, 1 on ImageNet, 2 when standardised")
    standardize: bool = result(False, "Z-score both sides' logits per image first (logit standardisation, Sun 2024)")


class HardLabelConfig(TermConfig):
    """Hard-label distillation (DeiT): cross-entropy with the teacher's most likely class; needs no labels."""

    weight: Weight = result(0.0, "weight of the cross-entropy; 0.5 with distill.label_weight=0.5 in DeiT; 0: off")
    token: bool = result(
        False,
        "read a distillation token instead of the classifier: the first register token (student.register_tokens=1) "
        "with a head of its own, which is not exported",
    )


class HintsConfig(PairsConfig):
    """FitNets: projected student tokens imitate teacher features (MSE), grids resampled to the student's."""

    weight: Weight = result(0.0, "weight, mean over pairs; 100 is usual for FitNets; 0: off")
    projector: Literal["linear", "mlp"] = result("linear", "kind of the projection from student to teacher width")
    normalize: Literal["none", "l2", "whiten"] = result(
        "none",
        "before the mean squared error; none in FitNets; l2: L2-normalise both; whiten: LayerNorm of the teacher's",
    )


class AttentionTransferConfig(PairsConfig):
    """Attention transfer: where activations are strong, mean over channels of their squares; any two networks."""

    weight: Weight = result(0.0, "weight, mean over pairs; 1000 is usual; 0: off")


class AttentionConfig(PairsConfig):
    """Where ViT blocks look: attention that each patch receives, mean over heads and queries; two ViTs."""


class TokenRelationsConfig(PairsConfig):
    """Token relations (TinyMIM, MiniLM): softmax(QK'/sqrt d) and softmax(VV'/sqrt d) of patch tokens; two ViTs."""

    weight: Weight = result(0.0, "weight of QK + VV, mean over pairs; 1 in TinyMIM; 0: off")
    num_heads: Positive | None = result(
        None, "number of heads into which both sides' queries, keys and values are split; null: the teacher's"
    )


class RKDDistanceConfig(TermConfig):
    """RKD: distances between the pooled features of the images of a micro-batch, in units of their mean."""

    weight: Weight = result(0.0, "weight; 25 in RKD; 0: off")


class RKDAngleConfig(TermConfig):
    """RKD: angles between the pooled features of all triplets of images of a micro-batch; B^3 numbers."""

    weight: Weight = result(0.0, "weight; 50 in RKD; 0: off")


class SimilarityPreservingConfig(TermConfig):
    """Similarity preserving: row-normalised Gram matrix of the pooled features of a micro-batch."""

    weight: Weight = result(0.0, "weight; 3000 is usual; 0: off")


class PKTConfig(TermConfig):
    """PKT: affinities of the pooled features of a micro-batch, as probabilities for each image."""

    weight: Weight = result(0.0, "weight; 30000 is usual; 0: off")


class ContrastiveConfig(TermConfig):
    """InfoNCE (CRD without memory bank): match the teacher's pooled feature of the same image, not of others."""

    weight: Weight = result(0.0, "weight of InfoNCE, mean of both directions; 1 was tried; 0: off")
    temperature: Temperature = result(0.07, "of the cosines; 0.05 to 0.2 is usual")
    width: Annotated[int, Field(ge=2, le=16384)] = result(128, "width that both sides are projected to; 128 is usual")


class ExitsConfig(TermConfig):
    """Be Your Own Teacher: the exits of student.exits learn from labels and from the final classifier."""

    needs_teacher: ClassVar[bool] = False

    weight: Weight = result(0.0, "weight of the sum over exits; 1 in Be Your Own Teacher; 0: off")
    alpha: Probability = result(
        0.3,
        "share of the final classifier's predictions in the loss: (1 - alpha) CE + alpha T^2 KL; 0.3 in the paper",
    )
    temperature: Temperature = result(3.0, "temperature T of the predictions; 3 in the paper")
    feature_weight: Weight = result(
        0.0,
        "weight of the squared distance of pooled features to the whitened ones before the final classifier; 0.5 cost "
        "3.5 points of top-1 on CIFAR-10 after 2 epochs; 0: none",
    )
    own_block: bool = result(
        False, "give each exit a block of its own before its classifier; a classifier alone is weak on shallow blocks"
    )
    trunk_gradients: bool = result(
        True, "let exits train the shared blocks, as in the paper; false: only their heads train (LGViT's second stage)"
    )


class SelfAttentionConfig(TermConfig):
    """Self-attention distillation (SAD): a block's activation map imitates the next one's; plain ViTs."""

    needs_teacher: ClassVar[bool] = False

    weight: Weight = result(
        0.0,
        "weight, mean over neighbours; 0.1 in SAD; with 64 patches 0.1 gave 1/7500 of the labels' gradient and changed "
        "nothing, 10 and 100 cost top-1; 0: off",
    )
    blocks: tuple[Count, ...] = result((), "0-based student blocks, shallow to deep, each learns from the next one")


class MutualConfig(TermConfig):
    """Deep mutual learning: students in one run learn from the labels and from each other's predictions."""

    needs_teacher: ClassVar[bool] = False

    weight: Weight = result(0.0, "weight of the mean KL(peer, student) over the peers, T 1; 1 in the paper; 0: off")
    students: tuple[str, ...] = result(
        (),
        'the peers, each by the settings in which it differs, as "student.width=192 student.num_heads=3" (init.*, '
        'student.*, seed); "" differs only in its seed, which is the run\'s seed + 1, + 2, ...',
    )


class CodistillationConfig(TermConfig):
    """Codistillation: runs that train at the same time learn from weights that they publish for each other."""

    needs_teacher: ClassVar[bool] = False

    weight: Weight = result(0.0, "weight of KL(mean of the peers, student), T 1; 1 in the paper; 0: off")
    start_epoch: Weight = result(0.0, "burn-in: epochs before the runs learn from each other; 40 % of all is usual")
    peers: tuple[str, ...] = result(
        (), "folders of the other runs, each of which names this one; each run needs access to the other folders"
    )
    every_steps: Positive = result(50, "steps between two exchanges of weights; 50 is usual")
    wait_seconds: Annotated[int, Field(ge=1, le=10_000_000)] = runtime(
        1800, "how long to wait for a peer: for its start, then for its weights of the same step"
    )
    # Runtime, so that a run that ended because a peer was missing can be continued without it.
    missing: Literal["stop", "leave_out"] = runtime(
        "stop", "if a peer does not appear: end this run (exit code 5), or continue without this peer permanently"
    )


class PastConfig(TermConfig):
    """Past predictions as teacher (after PS-KD): cross-entropy with labels mixed with the network's predictions."""

    # (1 - a) target + a past, a = alpha (e + 1) / E in epoch e of E. It contains the labels, so it replaces the
    # cross-entropy of label_weight: PS-KD is weight 1 with label_weight 0. If both are on, for example with a
    # start_epoch, the share of the past is a weight / (label_weight + weight).

    needs_teacher: ClassVar[bool] = False

    weight: Weight = result(
        0.0, "weight of the cross-entropy with the mixed targets; 1 with distill.label_weight=0 is PS-KD's; 0: off"
    )
    alpha: Probability = result(
        0.8, "share of the past predictions in the last epoch; it rises linearly; 0.8 in PS-KD; 0: the labels alone"
    )
    source: Literal["weights", "ema", "predictions"] = result(
        "weights",
        "where they come from; weights: the network as it was when the epoch began, none in the first epoch; ema: the "
        "average of optim.ema; both see the same mixed images; predictions: those in training an epoch ago, stored in "
        "the run folder, as in PS-KD; they need augment.mixup=0 augment.cutmix=0",
    )
    top_k: Positive | None = result(
        None,
        "with source=predictions: store this many of the most likely classes, 6 bytes each; spread the rest evenly; "
        "null: all classes, 2 bytes each",
    )

    @property
    def stores(self) -> bool:
        """Return whether predictions are stored."""
        return self.on and self.source == "predictions"

    def share_at(self, epoch: int, epochs: float) -> float:
        """Return the share of the past in the targets of an epoch, from 0, of a run of `epochs`."""
        return self.alpha * min(1.0, (epoch + 1) / epochs)


class DistillConfig(Section):
    """Teachers from which the network also learns while it is fine-tuned, and what it imitates."""

    teachers: tuple[str, ...] = result(
        (),
        "where they are: timm:NAME, hf-hub:ID, local-dir:PATH, run:PATH (a maedistill run) or file:PATH, or a bare "
        "path, in brackets; terms are averaged over several",
    )
    weights: tuple[str, ...] = result(
        (),
        "which weights of each teacher, in the order of teachers: ema or a name as in init.weights, or model for the "
        "usual ones; by default the usual ones of all",
    )
    image_size: Side | None = result(None, "side of the teachers' images, in pixels; null: each teacher's own")
    precision: Precision = result(
        "auto", "number format of the teachers; auto: bf16 on a GPU (fp16 below compute capability 8.0), fp32 on a CPU"
    )
    label_weight: Weight = result(
        1.0, "weight of the cross-entropy with the labels; 0.1 with KD's 0.9; 0: label-free, shards need no labels"
    )
    logits: LogitsConfig = LogitsConfig()
    dkd: DKDConfig = DKDConfig()
    hard_label: HardLabelConfig = HardLabelConfig()
    hints: HintsConfig = HintsConfig()
    attention_transfer: AttentionTransferConfig = AttentionTransferConfig()
    attention: AttentionConfig = AttentionConfig()
    token_relations: TokenRelationsConfig = TokenRelationsConfig()
    rkd_distance: RKDDistanceConfig = RKDDistanceConfig()
    rkd_angle: RKDAngleConfig = RKDAngleConfig()
    similarity_preserving: SimilarityPreservingConfig = SimilarityPreservingConfig()
    pkt: PKTConfig = PKTConfig()
    contrastive: ContrastiveConfig = ContrastiveConfig()
    exits: ExitsConfig = ExitsConfig()
    self_attention: SelfAttentionConfig = SelfAttentionConfig()
    mutual: MutualConfig = MutualConfig()
    codistillation: CodistillationConfig = CodistillationConfig()
    past: PastConfig = PastConfig()

    @property
    def terms(self) -> dict[str, TermConfig]:
        """Return the terms that are on, by name, in the order of the schema."""
        return {name: term for name, term in self if isinstance(term, TermConfig) and term.on}

    @property
    def teacher_terms(self) -> dict[str, TermConfig]:
        """Return the terms that are on and compare with a teacher."""
        return {name: term for name, term in self.terms.items() if term.needs_teacher}

    @property
    def logit_terms(self) -> tuple[str, ...]:
        """Return the terms that are on and compare predictions, so that classes must be the same."""
        return tuple(name for name in ("logits", "dkd", "hard_label") if name in self.terms)

    @property
    def standardizes(self) -> bool:
        """Return whether logits are converted to z-scores."""
        return any(term.on and term.standardize for term in (self.logits, self.dkd))

    @property
    def reads_labels(self) -> bool:
        """Return whether any loss uses the labels of training images."""
        return self.label_weight > 0 or self.dkd.on or self.past.on or (self.exits.on and self.exits.alpha < 1)
