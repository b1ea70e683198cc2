"""Rules between the keys of distillation: teachers and terms. The teachers are checked when they are opened."""

import math
import os
from collections.abc import Iterator

from maedistill.config import shared_rules
from maedistill.config.architectures import Architecture
from maedistill.config.distill import BATCH_RELATION_TERMS, PairsConfig, TermConfig
from maedistill.config.finetune import FinetuneConfig
from maedistill.config.schema import AUTO
from maedistill.config.shared_rules import Problem
from maedistill.config.sources import NETWORK_KINDS, SOURCE_KINDS
from maedistill.durable import why_not_local


def _teachers(c: FinetuneConfig) -> Iterator[Problem]:
    """Yield problems unless terms and teachers come together."""
    d = c.distill
    if d.teacher_terms and not d.teachers:
        names = ", ".join(d.teacher_terms)
        remedy = 'add e.g. distill.teachers=["timm:vit_base_patch16_224.augreg_in1k"], or set the weights to 0'
        yield Problem("distill.teachers", f"no teacher is named for {names}", remedy)
    if d.teachers and not d.teacher_terms:
        remedy = "give a term a weight, e.g. distill.logits.weight=1, or name no teacher"
        yield Problem(
            "distill.teachers", "a teacher is named, but every term that compares with it has weight 0", remedy
        )
    for source in d.teachers:
        yield from shared_rules.kind_of_source("distill.teachers", source, kinds=(*NETWORK_KINDS, "file"))
    if d.teachers and len(d.weights) not in (0, len(d.teachers)):
        cause = f"{len(d.weights)} choices of weights for {len(d.teachers)} teachers"
        yield Problem("distill.weights", cause, "name one for each, model for the usual weights; or none at all")
    for source, weights in zip(d.teachers, d.weights, strict=False):
        yield from shared_rules.several_weights(
            "distill.weights", weights, source=source, source_key="distill.teachers"
        )
    if len(set(d.teachers)) != len(d.teachers):
        yield Problem("distill.teachers", "a teacher is named twice", "name each once")
    if not d.teachers:
        for key in d.model_dump(include={"weights", "image_size", "precision"}, exclude_defaults=True):
            if key != "precision" or not d.codistillation.on:
                yield Problem(f"distill.{key}", "there is no teacher", "remove it, or add distill.teachers")


def _terms(c: FinetuneConfig) -> Iterator[Problem]:
    """Yield problems for a term with an invalid schedule or invalid pairs, and for settings of a term that is off."""
    for name, term in c.distill:
        if not isinstance(term, TermConfig):
            continue
        if term.on:
            yield from _schedule(c, name, term)
            if isinstance(term, PairsConfig):
                yield from _pairs(c.student_architecture, name, term)
            continue
        given = term.model_fields_set  # all keys with weight 0, defaults too, are in RUN/config.yaml
        if changed := term.model_dump(exclude_defaults=True).keys() if "weight" in given else given:
            remedy = f"set distill.{name}.weight above 0, or remove it"
            key, weight = f"distill.{name}.{min(changed)}", f"distill.{name}.weight"
            yield Problem(key, "the term is off: its weight is 0", remedy, ((key, weight),))


def _exits(c: FinetuneConfig) -> Iterator[Problem]:
    """Yield problems unless exits and what trains them come together, on blocks below the last one."""
    exits, arch = c.student.exits, c.student_architecture
    yield from _rising("student.exits", exits)
    if exits and arch is not None and max(exits) >= (last := arch.depth - 1):
        cause = f"block {max(exits)} does not exist, the student has {arch.depth}"
        if max(exits) == last:
            cause = f"block {last} is the student's last one, which has the final classifier"
        remedy = f"use blocks from 0 to {last - 1}" if last else "remove it, or set student.depth=2 or more"
        yield Problem("student.exits", cause, remedy)
    if exits and not c.distill.exits.on:
        cause = "nothing trains the exits: distill.exits has weight 0"
        yield Problem("student.exits", cause, "set distill.exits.weight=1")
    term, key = c.distill.exits, "distill.exits.temperature"
    if term.on and term.alpha == 0 and "temperature" in term.model_dump(exclude_defaults=True):
        cause = "the exits learn from labels alone: distill.exits.alpha is 0"
        yield Problem(key, cause, "remove it, or use a larger alpha", ((key, "distill.exits.alpha"),))
    if c.distill.exits.on and not exits:
        remedy = "add e.g. student.exits=[2,5,8], 0-based blocks"
        yield Problem("distill.exits.weight", "the student has no exits", remedy)


def _self_attention(c: FinetuneConfig) -> Iterator[Problem]:
    """Yield problems unless the term has neighbours to compare."""
    term, key = c.distill.self_attention, "distill.self_attention.blocks"
    if term.on and len(term.blocks) < 2:
        yield Problem(key, "two blocks or more are needed: each learns from the next", f"write e.g. {key}=[3,5,7]")
    yield from _rising(key, term.blocks)
    yield from shared_rules.blocks(key, term.blocks, arch=c.student_architecture, who="student")


def _mutual(c: FinetuneConfig) -> Iterator[Problem]:
    """Yield problems unless there are peers, and nothing else to learn from: other terms are of one student."""
    term, others = c.distill.mutual, [name for name in c.distill.terms if name != "mutual"]
    if term.on and not term.students:
        remedy = "write e.g. distill.mutual.students=['']: one peer, which differs only in its seed"
        yield Problem("distill.mutual.students", "there is no peer to learn from", remedy)
    if term.on and others:
        cause = f"mutual learning cannot be combined with distill.{others[0]}, which is for one student"
        yield Problem(f"distill.{others[0]}.weight", cause, "use one of the two")


def _codistillation(c: FinetuneConfig) -> Iterator[Problem]:
    """Yield problems unless there are other runs to learn from, and whole weights to publish."""
    term, key = c.distill.codistillation, "distill.codistillation.peers"
    if not term.on:
        return
    if not term.peers:
        yield Problem(key, "no other run is named", f"write e.g. {key}=[runs/b], and in that run {key}=[{c.run}]")
    folders = [os.path.realpath(os.path.expanduser(peer)) for peer in term.peers]
    for i, (peer, folder) in enumerate(zip(term.peers, folders, strict=True)):
        kind, _, name = peer.partition(":")
        if name and kind in SOURCE_KINDS:
            yield Problem(key, f"{peer} is not a run folder", f"name only the folder, without {kind}:, as {name}")
        elif problem := why_not_local(peer):
            yield Problem(key, *problem)
        elif c.run and folder == os.path.realpath(os.path.expanduser(c.run)):
            yield Problem(key, f"{peer} is this run itself", "name the other runs")
        elif folder in folders[:i]:
            yield Problem(key, f"{peer} is named twice", "name each run once")
    if c.engine.zero == 3:
        cause = "whole weights are published, and ZeRO 3 partitions them"
        yield Problem("distill.codistillation.weight", cause, "use engine.zero=2")


def _past(c: FinetuneConfig) -> Iterator[Problem]:
    """Yield problems unless the past exists whole on every rank, and the labels count once."""
    d, key = c.distill, "distill.past.source"
    if not d.past.on:
        return
    ends = [c.optim.epochs] if c.optim.epochs != AUTO else []
    ends += [d.past.stop_epoch] if d.past.stop_epoch is not None else []
    if d.past.source != "ema" and min(ends, default=2) <= 1:
        cause = f"{key}={d.past.source} uses the previous epoch, and the first epoch has none"
        yield Problem("distill.past.weight", cause, f"use more than one epoch and a later stop_epoch, or {key}=ema")
    if d.past.source == "ema" and c.optim.ema is None:
        remedy = "add e.g. optim.ema=0.9999, or use distill.past.source=weights"
        yield Problem(key, "the run has no moving average: optim.ema is null", remedy)
    if d.past.source == "weights" and c.engine.zero == 3:
        cause = "a copy of the network needs whole weights, and ZeRO 3 partitions them"
        yield Problem(key, cause, "use engine.zero=2, or distill.past.source=predictions")
    if d.past.stores and c.augment.mixes:
        name = "mixup" if c.augment.mixup > 0 else "cutmix"
        cause = "distill.past.source=predictions stores predictions of single samples, and mixed images have none"
        yield Problem(f"augment.{name}", cause, "use augment.mixup=0 augment.cutmix=0, or distill.past.source=weights")
    if d.past.top_k is not None and not d.past.stores:
        cause = f"nothing is stored with {key}={d.past.source}"
        yield Problem("distill.past.top_k", cause, f"remove it, or use {key}=predictions")
    if d.label_weight > 0 and not d.past.is_scheduled:
        cause = "the labels would count twice: they are in the targets of distill.past"
        remedy = "set distill.label_weight=0; a lower distill.past.alpha gives the labels more weight"
        yield Problem("distill.label_weight", cause, remedy)


def _rising(key: str, blocks: tuple[int, ...]) -> Iterator[Problem]:
    """Yield a problem unless blocks go from shallow to deep, each once."""
    if list(blocks) != sorted(set(blocks)):
        remedy = f"write {key}=[{','.join(map(str, sorted(set(blocks))))}]"
        yield Problem(key, f"{list(blocks)} does not go from shallow to deep, each block once", remedy)


def _labels(c: FinetuneConfig) -> Iterator[Problem]:
    """Yield problems if nothing trains the classifier at some step, or if a setting of labels has no effect."""
    d = c.distill
    classifying = [d.logits, d.dkd, d.mutual, d.past, *([] if d.hard_label.token else [d.hard_label])]
    if d.label_weight == 0 and not any(term.on and not term.is_scheduled for term in classifying):
        yield Problem(
            "distill.label_weight",
            "with weight 0, no loss trains the classifier in every step",
            "use a weight above 0, or distill.logits, dkd, hard_label, mutual or past without start_epoch, "
            "warmup_epochs, stop_epoch",
        )
    if not d.reads_labels and c.data.label_fraction < 1:
        cause = f"{c.data.label_fraction:g} of the labels, but none are used (distill.label_weight=0)"
        yield Problem("data.label_fraction", cause, "remove it, or use labels")
    if not d.reads_labels and "smoothing" in c.augment.model_dump(exclude_defaults=True):
        cause, replaced = "no loss uses labels (distill.label_weight=0)", ("augment.smoothing", "distill.label_weight")
        yield Problem("augment.smoothing", cause, "remove it, or use labels", (replaced,))
    if d.dkd.on and d.dkd.alpha == d.dkd.beta == 0:
        yield Problem("distill.dkd.alpha", "alpha and beta are both 0", "use 1 and 8, or set distill.dkd.weight=0")


def _batches(c: FinetuneConfig) -> Iterator[Problem]:
    """Yield a problem if a micro-batch has too few images for relations between them."""
    names = [name for name in BATCH_RELATION_TERMS if name in c.distill.terms]
    if names and c.engine.micro_batch == 1:
        cause = f"distill.{names[0]} compares images of a micro-batch, and there is only 1"
        yield Problem("engine.micro_batch", cause, "use 2 or more; the larger, the more relations")


def _schedule(c: FinetuneConfig, name: str, term: TermConfig) -> Iterator[Problem]:
    """Yield problems unless start, warm-up and stop lie in this order within the run."""
    last = "optim.epochs" if term.stop_epoch is None else "stop_epoch"
    epochs = math.inf if c.optim.epochs == AUTO else c.optim.epochs  # looked at again once it is a number
    end = epochs if term.stop_epoch is None else term.stop_epoch
    if term.start_epoch >= end:
        cause = f"{term.start_epoch:g} is not below {last}={end:g}"
        yield Problem(f"distill.{name}.start_epoch", cause, "start earlier")
    elif term.start_epoch + term.warmup_epochs > end:
        cause = f"{term.warmup_epochs:g} epochs from {term.start_epoch:g} on last beyond the term's end at {end:g}"
        yield Problem(f"distill.{name}.warmup_epochs", cause, f"use at most {end - term.start_epoch:g}")
    if term.stop_epoch is not None and term.stop_epoch > epochs:
        cause = f"{term.stop_epoch:g} is after the end, optim.epochs={epochs:g}"
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
    yield from shared_rules.blocks(f"distill.{name}.student", term.student, arch=student, who="student")


RULES = (_teachers, _terms, _exits, _self_attention, _mutual, _codistillation, _past, _labels, _batches)
