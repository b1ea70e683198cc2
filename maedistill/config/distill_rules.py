"""Rules between the keys of distillation in fine-tuning. The teachers themselves are checked when they are opened."""

from collections.abc import Iterator

from maedistill.config import shared_rules
from maedistill.config.architectures import Architecture
from maedistill.config.distill import BATCH_RELATION_TERMS, PairsConfig, TermConfig
from maedistill.config.finetune import FinetuneConfig
from maedistill.config.problem import Problem


def teachers(c: FinetuneConfig) -> Iterator[Problem]:
    """Yield problems unless terms and teachers come together."""
    d = c.distill
    if d.terms and not d.teachers:
        names = ", ".join(d.terms)
        remedy = 'add e.g. distill.teachers=["timm:vit_base_patch16_224.augreg_in1k"], or set the weights to 0'
        yield Problem("distill.teachers", f"no teacher is named for {names}", remedy)
    if d.teachers and not d.terms:
        remedy = "give a term a weight, e.g. distill.logits.weight=1, or name no teacher"
        yield Problem("distill.teachers", "a teacher is named, but every term has weight 0", remedy)
    for source in d.teachers:
        yield from shared_rules.kind_of_source("distill.teachers", source, kinds=shared_rules.NETWORK_KINDS)
    if len(set(d.teachers)) != len(d.teachers):
        yield Problem("distill.teachers", "a teacher is named twice", "name each once")
    if not d.teachers:
        for key in ("image_size", "precision"):
            if getattr(d, key) != type(d).model_fields[key].default:
                yield Problem(f"distill.{key}", "there is no teacher", "remove it, or add distill.teachers")


def terms(c: FinetuneConfig) -> Iterator[Problem]:
    """Yield problems for a term with an invalid schedule or invalid pairs, and for settings of a term that is off."""
    sections = {name: getattr(c.distill, name) for name in type(c.distill).model_fields}
    for name, term in sections.items():
        if not isinstance(term, TermConfig):
            continue
        if not term.on:
            changed = [key for key in sorted(term.model_fields_set) if getattr(term, key) != _default(term, key)]
            if changed:
                remedy = f"set distill.{name}.weight above 0, or remove it"
                yield Problem(f"distill.{name}.{changed[0]}", "the term is off: its weight is 0", remedy)
            continue
        yield from _schedule(c, name, term)
        if isinstance(term, PairsConfig):
            yield from _pairs(c.student_architecture, name, term)


def labels(c: FinetuneConfig) -> Iterator[Problem]:
    """Yield problems if nothing trains the classifier at some step, or if a setting of labels has no effect."""
    d = c.distill
    classifying = [d.logits, d.dkd, *([] if d.hard_label.token else [d.hard_label])]
    lasting = [term for term in classifying if term.on and term.start_epoch == term.warmup_epochs == 0]
    lasting = [term for term in lasting if term.stop_epoch is None]
    if d.label_weight == 0 and not lasting:
        cause = "with weight 0, no loss trains the classifier in every step"
        remedy = (
            "use a weight above 0, or distill.logits, dkd or hard_label without start_epoch, warmup_epochs, stop_epoch"
        )
        yield Problem("distill.label_weight", cause, remedy)
    if not d.reads_labels and c.data.label_fraction < 1:
        cause = f"{c.data.label_fraction:g} of the labels, where none is used (distill.label_weight=0)"
        yield Problem("data.label_fraction", cause, "remove it, or use labels")
    if d.dkd.on and d.dkd.alpha == d.dkd.beta == 0:
        yield Problem("distill.dkd.alpha", "alpha and beta are both 0", "use 1 and 8, or set distill.dkd.weight=0")


def batches(c: FinetuneConfig) -> Iterator[Problem]:
    """Yield a problem if a micro-batch has too few images for relations between them."""
    names = [name for name in BATCH_RELATION_TERMS if name in c.distill.terms]
    if names and c.engine.micro_batch == 1:
        cause = f"1 image has no relation to others, as distill.{names[0]} needs"
        yield Problem("engine.micro_batch", cause, "use 2 or more; the larger, the more relations")


def _schedule(c: FinetuneConfig, name: str, term: TermConfig) -> Iterator[Problem]:
    """Yield problems unless start, warm-up and stop lie in this order within the run."""
    end = term.stop_epoch if term.stop_epoch is not None else c.optim.epochs
    if term.start_epoch >= end:
        what = "stop_epoch" if term.stop_epoch is not None else "optim.epochs"
        cause = f"{term.start_epoch:g} is not below {what}={end:g}"
        yield Problem(f"distill.{name}.start_epoch", cause, "start earlier")
    elif term.start_epoch + term.warmup_epochs > end:
        cause = f"{term.warmup_epochs:g} epochs from {term.start_epoch:g} on go beyond the term's end at {end:g}"
        yield Problem(f"distill.{name}.warmup_epochs", cause, f"use at most {end - term.start_epoch:g}")
    if term.stop_epoch is not None and term.stop_epoch > c.optim.epochs:
        cause = f"{term.stop_epoch:g} is after the end, optim.epochs={c.optim.epochs:g}"
        yield Problem(f"distill.{name}.stop_epoch", cause, "use an epoch before it, or null")


def _pairs(student: Architecture | None, name: str, term: PairsConfig) -> Iterator[Problem]:
    """Yield problems unless depths are paired one to one and exist, as far as the config can know."""
    if not term.student or len(term.student) != len(term.teacher):
        yield Problem(
            f"distill.{name}.student",
            f"{len(term.student)} student blocks for {len(term.teacher)} teacher depths",
            f"pair them one to one, e.g. distill.{name}.student=[11] distill.{name}.teacher=[4]",
        )
    if len(set(zip(term.student, term.teacher, strict=False))) < len(term.student) == len(term.teacher):
        yield Problem(f"distill.{name}.student", "a pair is named twice", "name each pair once")
    if student is not None and term.student and max(term.student) >= student.depth:
        cause = f"block {max(term.student)} does not exist, the student has {student.depth}"
        yield Problem(f"distill.{name}.student", cause, f"use 0 to {student.depth - 1}")


def _default(term: TermConfig, key: str) -> object:
    return type(term).model_fields[key].default


RULES = (teachers, terms, labels, batches)
