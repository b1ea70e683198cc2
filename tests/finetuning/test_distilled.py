"""Fine-tuning with terms: they vanish where student and teacher agree, add up by weight, and reach every parameter."""

from functools import partial
from types import SimpleNamespace

import pytest
import timm
import torch
from torch.nn import functional as F

from maedistill.config import distill
from maedistill.config.finetune import FinetuneConfig
from maedistill.config.loader import load_config
from maedistill.config.plan import make_plan
from maedistill.finetuning.build_distillation import build_module, build_teachers
from maedistill.finetuning.objective import Distilled
from maedistill.finetuning.outputs import RequestedOutputs, feature_info, forward_outputs
from maedistill.finetuning.setup import Finetuning
from maedistill.finetuning.teacher import TeacherSource
from maedistill.finetuning.term_weights import TermWeights
from maedistill.finetuning.terms import Contrastive
from maedistill.losses.relations import contrast_loss
from maedistill.weights.network import Network

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TARGETS = F.one_hot(torch.tensor([0, 4, 2, 2]), 5).float()
ALONE = {  # settings of each term by itself; a ViT teaches
    "logits": "{weight: 2, temperature: 3}",
    "logits standardised": "{weight: 2, temperature: 2, standardize: true}",
    "dkd": "{weight: 2, alpha: 1.5, beta: 0.5}",
    "dkd standardised": "{weight: 2, standardize: true}",
    "attention_transfer": "{weight: 2, student: [0, 2], teacher: [0, 2]}",
    "attention": "{weight: 2, student: [1, 2], teacher: [1, 2]}",
    "token_relations": "{weight: 2, student: [0, 2], teacher: [0, 2], num_heads: 4}",
    "rkd_distance": "{weight: 2}",
    "rkd_angle": "{weight: 2}",
    "similarity_preserving": "{weight: 2}",
    "pkt": "{weight: 2}",
}
PLAIN = ("logits", "rkd_distance", "rkd_angle", "similarity_preserving", "pkt")  # weight 2, one part
EVERYTHING = [f"distill.{name}={value}" for name, value in ALONE.items() if "standardised" not in name]
EVERYTHING += ["distill.hints={weight: 3, student: [0, 1], teacher: [1, 2], projector: mlp, normalize: whiten}"]
EVERYTHING += ["distill.contrastive={weight: 2, temperature: 0.2, width: 24}"]
EVERYTHING += ["distill.hard_label={weight: 1, token: true}", "student.register_tokens=1"]


def load(tmp_path, *settings, taught: bool = True) -> FinetuneConfig:
    """A config of a tiny student with these settings, and with a teacher or without."""
    file = tmp_path / "recipe.yaml"
    file.write_text("student: {model: vit_tiny_patch16_224, patch_size: 8}\ndata: {image_size: 32}\n")
    given = ['distill.teachers=["run:x"]'] if taught else []
    given += ["optim={epochs: 10, warmup_epochs: 1, global_batch: 8}", *settings]
    return load_config(file, given, root=FinetuneConfig, to_run=False).config


def vit(*, seed: int, width: int = 32, num_heads: int = 2, **more) -> torch.nn.Module:
    """A network in which no parameter has a special value."""
    torch.manual_seed(seed)
    shape = {"embed_dim": width, "depth": 3, "num_heads": num_heads, "patch_size": 8, "img_size": 32, "num_classes": 5}
    built = timm.create_model("vit_tiny_patch16_224", **shape, **more)
    for parameter in built.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return built


def teacher_of(network: torch.nn.Module, *, size: int = 32) -> TeacherSource:
    """A network as it is opened, with the student's normalisation."""
    words = {"name": "run:x", "interpolation": "bicubic", "crop_mode": "center", "license": "mit"}
    opened = Network(network.eval(), **words, mean=MEAN, std=STD, size=size, crop=1.0, num_classes=5)
    return TeacherSource(opened, feature_info(network, name="run:x", image_size=size), None, "")


def assemble(config: FinetuneConfig, student: torch.nn.Module, *teachers: TeacherSource):
    """The module, and the function that gives its inputs from teachers, 80 images: 10 steps an epoch."""
    module, plan, cpu = (
        build_module(config, student, list(teachers)),
        make_plan(config, 80, world_size=1),
        torch.device("cpu"),
    )
    frozen = build_teachers(config, list(teachers), grid=4, plan=plan, mean=MEAN, std=STD, device=cpu)
    weights = TermWeights(tuple(config.distill.terms.values()), plan, cpu)
    parts = SimpleNamespace(frozen=frozen, weights=weights, past=None, codistillation=None)
    return module, partial(Finetuning.teacher_outputs, parts)


@pytest.mark.parametrize("case", ALONE)
def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient(tmp_path, case):
    """Both sides see pixels that differ by rounding, so zero is 1e-5 of what another teacher gives."""
    name = case.split()[0]
    student = vit(seed=1).eval()
    config = load(tmp_path, "distill.label_weight=1", f"distill.{name}={ALONE[case]}")
    totals, gradients = [], []
    for teacher in (vit(seed=1), vit(seed=2)):
        module, teaching = assemble(config, student, teacher_of(teacher))
        losses = module(IMAGES, TARGETS, *teaching(IMAGES, 0))
        (term,) = module.terms.values()
        parts = {key: value for key, value in losses.items() if key.startswith(name)}
        total = term.total(parts)
        totals.append(abs(total.item()))
        found = torch.autograd.grad(total, list(student.parameters()), allow_unused=True)
        gradients.append(max(float(g.abs().max()) for g in found if g is not None))
        torch.testing.assert_close(losses["loss"], losses["cross_entropy"] + 2 * total)
    assert totals[0] < 1e-5 * totals[1] and gradients[0] < 2e-3 * gradients[1]


@pytest.mark.parametrize("count", [1, 2])
def test_all_terms_reach_every_parameter_and_add_up(tmp_path, count):
    """The teacher has other widths, heads and depth; with two, each term is the mean over them."""
    config = load(tmp_path, *EVERYTHING)
    student = vit(seed=1, reg_tokens=1)
    teachers = [vit(seed=2 + i, width=48 + 16 * i, num_heads=4) for i in range(count)]
    module, teaching = assemble(config, student, *map(teacher_of, teachers))
    losses = module(IMAGES, TARGETS, *teaching(IMAGES, 0))
    losses["loss"].backward()
    assert [name for name, p in module.named_parameters() if p.grad is None or not p.grad.count_nonzero()] == []
    assert not any(p.grad is not None for teacher in teachers for p in teacher.parameters())
    expected = losses["cross_entropy"] + losses["hard_label"] + 1.5 * (losses["hints/0-1"] + losses["hints/1-2"])
    expected = expected + 2 * (1.5 * losses["dkd/tckd"] + 0.5 * losses["dkd/nckd"])
    expected = expected + 2 * sum(losses[name] for name in (*PLAIN, "contrastive"))
    for name in ("attention_transfer", "attention", "token_relations"):
        expected = expected + 2 * sum(v for key, v in losses.items() if key.startswith(f"{name}/")) / 2
    torch.testing.assert_close(losses["loss"], expected)
    alone = [assemble(load(tmp_path, *EVERYTHING), student, teacher_of(teacher)) for teacher in teachers]
    each = [one(IMAGES, TARGETS, *teacher_outputs(IMAGES, 0)) for one, teacher_outputs in alone]
    for name in ("logits", "dkd/tckd", "attention_transfer/0-0", "token_relations/2-2/vv", "pkt"):
        torch.testing.assert_close(losses[name], torch.stack([one[name] for one in each]).mean())


@pytest.mark.parametrize(
    ("term", "part", "parameters"),
    [("hints={student: [2], teacher: [4], ", "hints/2-4", 2), ("contrastive={", "contrastive", 4)],
)
def test_a_step_without_a_term_asks_no_teacher_and_keeps_every_gradient(tmp_path, term, part, parameters):
    config = load(tmp_path, f"distill.{term}weight: 1, stop_epoch: 2, start_epoch: 1}}")
    teacher = timm.create_model("resnet10t", num_classes=5)
    asked = []
    teacher.fc.register_forward_hook(lambda *_: asked.append(0))
    teacher.layer4.register_forward_hook(lambda *_: asked.append(1))
    module, teaching = assemble(config, vit(seed=1), teacher_of(teacher))
    for step, counts in ((0, False), (10, True), (19, True), (20, False)):
        asked.clear()
        module.zero_grad()
        losses = module(IMAGES, TARGETS, *teaching(IMAGES, step))
        losses["loss"].backward()
        assert asked == [1] * counts and (part in losses) == counts, "the classifier of the teacher never runs"
        trained = [bool(p.grad.count_nonzero()) for p in module.terms.parameters()]
        assert trained == [counts] * parameters


@pytest.mark.parametrize("autocast", [False, True])
def test_contrast_compares_projections_in_full_precision(autocast):
    """Each of two teachers, in bf16 here, has its projection; with autocast those are in bf16, the loss is not."""
    torch.manual_seed(0)
    section = distill.ContrastiveConfig(weight=1, width=24, temperature=0.3)
    student, *teachers = (SimpleNamespace(embedding=width) for width in (32, 16, 48))
    term = Contrastive("contrastive", section, student, teachers)
    rows, theirs = torch.randn(6, 32), torch.randn(6, 48).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = term({"embedding": rows}, {"embedding": theirs}, torch.arange(6), number=1)["contrastive"]
        sides = term.student[1](rows), term.teacher[1](theirs.float())
    assert torch.equal(found, contrast_loss(*sides, temperature=0.3))


def test_a_distillation_token_is_read_and_the_classifier_is_not(tmp_path):
    """The token's head alone learns the teacher's classes; the classifier has the labels' gradient only."""
    student = vit(seed=1, reg_tokens=1).eval()
    teacher = teacher_of(vit(seed=2))
    config = load(tmp_path, "distill.hard_label={weight: 1, token: true}", "student.register_tokens=1")
    module, teaching = assemble(config, student, teacher)
    losses = module(IMAGES, TARGETS, *teaching(IMAGES, 0))
    tokens = forward_outputs(student, IMAGES, RequestedOutputs(tokens=True))["tokens"]
    logits = module.terms["hard_label"].head(tokens[:, 1])
    expected = F.cross_entropy(logits, teacher.network.module(IMAGES).argmax(1))
    torch.testing.assert_close(losses["hard_label"], expected)
    assert (
        torch.autograd.grad(losses["hard_label"], student.head.weight, allow_unused=True, retain_graph=True)[0] is None
    )
    assert torch.autograd.grad(losses["hard_label"], student.reg_token)[0].count_nonzero()


def test_dkd_takes_the_label_that_a_mixed_image_shows_more_of(tmp_path):
    config = load(tmp_path, "distill.dkd={weight: 1}")
    module, teaching = assemble(config, vit(seed=1).eval(), teacher_of(vit(seed=2)))
    teacher_outputs = teaching(IMAGES, 0)
    mixed = 0.7 * TARGETS + 0.3 * TARGETS.flip(0)
    for name in ("dkd/tckd", "dkd/nckd"):
        assert torch.equal(
            module(IMAGES, mixed, *teacher_outputs)[name], module(IMAGES, TARGETS, *teacher_outputs)[name]
        )
        assert not torch.equal(
            module(IMAGES, TARGETS.flip(0), *teacher_outputs)[name], module(IMAGES, TARGETS, *teacher_outputs)[name]
        )


def test_weights_change_without_another_graph(tmp_path):
    """Whole graphs under torch.compile, and one of them for every weight."""
    config = load(tmp_path, *EVERYTHING)
    student = vit(seed=1, reg_tokens=1).eval()
    module, teaching = assemble(config, student, teacher_of(vit(seed=2, width=48, num_heads=4)))
    assert isinstance(module, Distilled)
    outputs, weights = teaching(IMAGES, 0)
    expected = [module(IMAGES, TARGETS, outputs, weights * factor)["loss"] for factor in (1, 0.5)]
    graphs = []
    module.compile(backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    for factor, loss in zip((1, 0.5), expected, strict=True):
        torch.testing.assert_close(module(IMAGES, TARGETS, outputs, weights * factor)["loss"], loss)
    assert len(graphs) == 1
    torch.compiler.reset()
