"""The model card of an export: README.md with the front matter that model hubs read.

Every statement comes from the run's own files (run.json, config.yaml, metrics.jsonl) or from the network; the card
names what they do not record. Metrics after the exported checkpoint are left out, because they are of other weights.
Cards travel: PATH stands for what would name folders of this machine.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import yaml

from maedistill.config.finetune import FinetuneConfig
from maedistill.config.pretrain import PretrainConfig
from maedistill.config.schema import RunConfig
from maedistill.escaping import code, markdown, without_paths
from maedistill.finetuning.peers import peer_configs
from maedistill.models.flops import forward_gflop
from maedistill.models.vits import PlainViT, num_params_m
from maedistill.pretraining.build import mask_sizes
from maedistill.report.formatting import KNN_CAVEAT, percent
from maedistill.runs.history import RESERVED, own_method, read_metrics
from maedistill.runs.state import stated_step
from maedistill.weights.from_run import RunNetwork, Weights
from maedistill.weights.license import hub_license, license_sentence

METHODS = {
    None: "by a method that is not recorded",
    "mae": "as a masked autoencoder (MAE, He et al., CVPR 2022)",
    "dmae": "by distillation of a teacher's features (DMAE, Bai et al., CVPR 2023)",
    "amd": "by asymmetric masked distillation (AMD, Zhao et al., CVPR 2024)",
    "tinymim": "by distillation of a teacher's token relations (after TinyMIM, Ren et al., CVPR 2023)",
}


def model_card(
    saved: RunNetwork, vit: PlainViT, *, weights: Weights = "model", record: Mapping[str, Any] | None = None
) -> str:
    """Return the Markdown card of `vit`, the network of `saved` in its exported form.

    record: of the export, see export.json: formats, graphs and what int8 cost. Without one, of timm's format alone.
    """
    record = record or {"formats": ["timm"]}
    metadata, folder = saved.metadata, saved.folder
    config = folder.load_config() if folder.config.exists() else None
    step = stated_step(saved.checkpoint)  # its folder may have any name
    records = [record for record in read_metrics(folder.path) if step is not None and record["step"] <= step]
    tuned = metadata["stage"] == "finetune"
    sections = {
        "Origin and license": _origin(metadata),
        "Training": _training(saved, config, vit, step, weights),
        "Results": _accuracy(records, metadata, _prefix(saved, weights))
        if tuned
        else _features(records, config, weights),
        "Use": [*(_use(metadata, vit) if "timm" in record["formats"] else []), *_graphs(metadata, vit, record)],
        "Limits": _limits(metadata, vit),
    }
    body = "\n".join(f"## {title}\n\n" + "\n".join(lines) + "\n" for title, lines in sections.items())
    name = markdown(folder.path.resolve().name)
    return f"{_front_matter(metadata, vit, record['formats'])}# {name}\n\n{_summary(metadata, vit)}\n\n{body}"


def _front_matter(metadata: Mapping[str, Any], vit: PlainViT, formats: Sequence[str]) -> str:
    identifier, name = hub_license(metadata["license"])
    origin = metadata.get("origin") or {}
    method = next((one["method"] for one in (metadata, origin) if one.get("method") and not own_method(one)), None)
    library = ["timm"] if "timm" in formats else []  # graphs alone open without it
    tags = [*library, "vision-transformer", *([method] if method else [])]
    if any(one.get("teacher") for one in (metadata, origin)):
        tags.append("knowledge-distillation")
    entries = {
        **({"library_name": "timm"} if library else {}),
        "license": identifier,
        **({"license_name": name} if name else {}),
        "pipeline_tag": "image-classification" if vit.num_classes else "image-feature-extraction",
        "tags": tags,
    }
    return f"---\n{yaml.safe_dump(entries, sort_keys=False)}---\n\n"


def _summary(metadata: Mapping[str, Any], vit: PlainViT) -> str:
    """Describe the network and its cost in one paragraph."""
    size, patch = vit.patch_embed.img_size[0], vit.patch_embed.patch_size[0]
    tokens = "a class token" if vit.cls_token is not None else "no class token"
    tokens += f" and {vit.reg_token.shape[1]} register tokens" if vit.reg_token is not None else ""
    pooled = {"avg": "mean of the patch tokens", "token": "class token"}[vit.global_pool]
    gives = f"{vit.num_classes:,} logits" if vit.num_classes else f"{vit.embed_dim} features"
    tuned = "Fine-tuned with a teacher" if metadata.get("teacher") else "Fine-tuned on labels"
    how = tuned if metadata["stage"] == "finetune" else f"Pre-trained {_method(metadata)}"
    return (
        f"{how}: a Vision Transformer (timm's {code(metadata['network']['name'])}), {vit.embed_dim} wide, "
        f"{len(vit.blocks)} blocks, with {tokens}, on images of {size} px in patches of {patch} px. "
        f"{num_params_m(vit):.2f} M parameters, {forward_gflop(vit):.3g} GFLOP for one image's forward pass (a "
        f"multiply-add counts as two). The output is {gives}, from the {pooled}."
    )


def _method(metadata: Mapping[str, Any]) -> str:
    """Say by what method a network was pre-trained."""
    own = own_method(metadata)
    return f"by {code(own)}, a custom method" if own else METHODS[metadata.get("method")]


def _origin(metadata: Mapping[str, Any]) -> list[str]:
    """List the weights that the network derives from, their license, and the training images."""
    origin, teacher, lines = metadata.get("origin") or {}, metadata.get("teacher"), []
    if metadata["stage"] == "finetune":
        lines.append(f"- Start: {_listed(metadata.get('init') or 'from scratch, no other weights')}.")
        lines += [f"- Teacher of the fine-tuning: {_listed(teacher)}."] if teacher else []
        teacher = None  # the initial weights may have had a teacher of their own
    if origin.get("stage") == "finetune":
        lines.append(f"- That start was itself fine-tuned{_images(origin, ' on')}; its own start is not recorded here.")
    elif origin:
        teacher = teacher or origin.get("teacher")
        lines.append(f"- That start was pre-trained {_method(origin)}{_images(origin, ', on')}.")
    if teacher or metadata["stage"] == "pretrain" or origin.get("stage") == "pretrain":
        lines.append(f"- Teacher: {_listed(teacher or 'none')}.")
    lines.append(f"- License: {license_sentence(metadata['license'])}")
    return [*lines, f"- Data:{_images(metadata) or ' not recorded'}. The license of the images is not recorded."]


def _listed(line: str) -> str:
    """Turn a log line, whose parts are separated by two spaces, into prose."""
    return markdown(without_paths(line)).replace("  ", ", ")


def _images(metadata: Mapping[str, Any], before: str = "") -> str:
    """Return `before 50,000 images (fingerprint 0123456789ab)`, or "" if no data is recorded."""
    data = metadata.get("data")
    return f"{before} {data['images']:,} images (fingerprint {data['fingerprint'][:12]})" if data else ""


def _training(
    saved: RunNetwork, config: RunConfig | None, vit: PlainViT, step: int | None, weights: Weights
) -> list[str]:
    metadata, exit, peer = saved.metadata, saved.exit, saved.peer
    averaged = ", the moving average of the weights" if weights == "ema" else ""
    ends = f", the network that ends at its exit after block {exit}" if exit is not None else ""
    ends = f", student {peer} of mutual learning{ends}" if peer else ends
    after = "of a step that is not recorded" if step is None else f"after step {step:,}"
    lines = [f"- These weights: the checkpoint {after}{averaged}{ends}."]
    if config is None:
        lines.append("- The settings are missing: the run folder had no config.yaml.")
    else:
        optim = config.optim
        seed, tuned = config.seed, list[str]()
        if isinstance(config, FinetuneConfig):
            student = [config, *peer_configs(config)][peer]
            seed, tuned = student.seed, _finetuning(config, student, metadata.get("left_out") or {})
        clip = f", gradients clipped at {optim.clip:g}" if optim.clip is not None else ""
        lines += [
            f"- Training shards: {code(without_paths(config.data.train, word=True))}.",
            *(_pretraining(config, vit, own_method(metadata)) if isinstance(config, PretrainConfig) else []),
            *tuned,
            f"- Schedule: {optim.epochs:g} epochs, {optim.global_batch} images a step; AdamW with betas {optim.betas}, "
            f"peak learning rate {optim.peak_lr:.3g} after {optim.warmup_epochs:g} epochs of warm-up, cosine to "
            f"{optim.min_lr:g}, weight decay {optim.weight_decay:g}{clip}; seed {seed}.",
        ]
    starts = metadata.get("starts", [])
    commands = Counter(without_paths(start["command"], command=True) for start in starts)
    lines += [f"- Command: {code(command)}, started {count} time(s)." for command, count in commands.items()]
    if not starts:
        return [*lines, "- Command and software versions are not recorded."]
    versions = ", ".join(f"{name} {number}" for name, number in starts[-1]["versions"].items())
    return [*lines, f"- Software: {versions}."]


def _pretraining(config: PretrainConfig, vit: PlainViT, own: str | None) -> list[str]:
    """Describe the pre-training. own: a method whose losses are not known here."""
    num_patches = vit.patch_embed.num_patches
    student, teacher = mask_sizes(config, num_patches)
    sees = f"the student sees {student} of {num_patches} patches"
    align = config.align
    rises = f", rising from 0 in the first {align.warmup_share:.0%} of the run" if align.warmup_share else ""
    losses = []
    if config.pixels.weight:
        losses.append(f"pixels of the hidden patches (target {config.pixels.target}, weight {config.pixels.weight:g})")
    if config.method != "mae":
        sees += f", the teacher {teacher}, including those" if teacher > student else ", the teacher the same"
        pairs = ", ".join(f"{s} with {t}" for s, t in zip(align.student, align.teacher, strict=True))
        what = "" if align.output == "block" else ", what their MLPs add"
        what += f", target the mean of {align.last_blocks} blocks up to the named one" if align.last_blocks else ""
        how = f"{align.distance}, normalisation {align.normalize}{what}"
        how = "token relations QK and VV" if config.method == "tinymim" else how
        losses.append(
            f"alignment of student with teacher blocks, counted from 0: {pairs} ({how}, weight {align.weight:g}{rises})"
        )
    more = (without_paths(text, word=True) for text in config.more_teachers)
    losses += [f"alignment with a further teacher, where it differs: {code(text)}" for text in more]
    if config.method == "amd" and config.generate.weight:
        losses.append(f"generated alignment where only the teacher sees (weight {config.generate.weight:g}{rises})")
    losses = [f"those of {code(own)}"] if own else losses
    decoder, data, (low, high) = config.decoder, config.data, config.data.crop_scale
    return [
        f"- Masks: {sees}.",
        f"- Losses: {'; '.join(losses)}.",
        *([f"- Decoder: {decoder.width} wide, {decoder.depth} blocks; not exported."] if config.needs_decoder else []),
        f"- Augmentation: crops of {low:g} to {high:g} of the area{', flips' if data.flip else ''}.",
    ]


def _finetuning(config: FinetuneConfig, student: FinetuneConfig, left_out: Mapping[str, int]) -> list[str]:
    """Describe the fine-tuning.

    student: the config of the peer that is exported, or the run's. left_out: codistilled runs that were left out, with
    the step from which on.
    """
    data, augment, (low, high) = config.data, config.augment, config.data.crop_scale
    share = f"; trained on {data.label_fraction:.3g} of each class's labels" if data.label_fraction < 1 else ""
    mixing = f"mixup {augment.mixup:g}, cutmix {augment.cutmix:g}" if augment.mixes else "no mixing"
    terms = "".join(
        f", {name} {term.weight:g}{_how(config, name, left_out)}" for name, term in config.distill.terms.items()
    )
    return [
        *([f"- Losses, with their weights: labels {config.distill.label_weight:g}{terms}."] if terms else []),
        f"- Augmentation: crops of {low:g} to {high:g} of the area{', flips' if data.flip else ''}, "
        f"RandAugment {augment.rand_augment or 'off'}, {mixing}, erasing {augment.erasing:g}, label smoothing "
        f"{augment.smoothing:g}{share}.",
        f"- Layer-wise learning rates: times {config.optim.layer_decay:g} a layer; drop path "
        f"{student.student.drop_path:g}; pooling {student.student.global_pool}.",
    ]


def _how(config: FinetuneConfig, name: str, left_out: Mapping[str, int]) -> str:
    """Describe, in parentheses, a term without a teacher; empty for the others."""
    distill, exits = config.distill, ", ".join(map(str, config.student.exits))
    sources = {
        "weights": "the weights at the beginning of the epoch",
        "ema": "the moving average",
        "predictions": "the epoch before",
    }
    runs = len(distill.codistillation.peers)
    steps = sorted(Counter(left_out.values()).items())
    alone = [f"without {count} of them from step {step} on" for step, count in steps]
    parts = {
        "exits": [f"after blocks {exits}", f"predictions of the end {distill.exits.alpha:g}"],
        "mutual": [f"{len(distill.mutual.students) + 1} students in one run"],
        "codistillation": [
            f"with {runs} other run{'s' * (runs > 1)}",
            f"weights exchanged every {distill.codistillation.every_steps} steps",
            *alone,
        ],
        "past": [
            f"targets mixed with predictions of {sources[distill.past.source]}",
            f"{distill.past.alpha:g} at the end",
        ],
    }
    return f" ({', '.join(parts[name])})" if name in parts else ""


def _features(records: Sequence[Mapping[str, Any]], config: RunConfig | None, weights: Weights) -> list[str]:
    """Report the losses and kNN accuracy of a pre-trained student."""
    losses = next((record for record in reversed(records) if "loss" in record), None)
    probe = next((record for record in reversed(records) if "knn" in record), None)
    lines = []
    if losses is not None:
        parts = {name: value for name, value in losses.items() if name not in RESERVED and value is not None}
        values = ", ".join(f"{markdown(name)} {value:.4f}" for name, value in parts.items())
        lines.append(f"- Training losses by epoch {losses['epoch']:.1f}: {values}.")
    if probe is not None:
        bank = f" to at most {config.log.knn_images:,} training images" if isinstance(config, PretrainConfig) else ""
        lines.append(f"- kNN accuracy at epoch {probe['epoch']:.1f}: {probe['knn']:.1%}, compared{bank}. {KNN_CAVEAT}")
    if weights == "ema" and lines:
        lines.append("- These figures are of the weights as trained; their moving average was not measured.")
    return [*(lines or ["- No measurement is recorded."]), "- No accuracy after fine-tuning is recorded for this run."]


def _prefix(saved: RunNetwork, weights: Weights) -> str:
    """Return the prefix of the metrics of a network that fine-tuning scored."""
    part = (f"peer{saved.peer}_" if saved.peer else "") + (f"exit{saved.exit}_" if saved.exit is not None else "")
    return ("ema_" if weights == "ema" else "") + part


def _accuracy(records: Sequence[Mapping[str, Any]], metadata: Mapping[str, Any], prefix: str) -> list[str]:
    """Report top-1 and top-5 of a fine-tuned network. prefix: of its metrics."""
    last = next((record for record in reversed(records) if f"{prefix}top1" in record), None)
    if last is None:
        return ["- No evaluation of these weights is recorded."]
    top1, top5, images, loss = (last[prefix + key] for key in ("top1_correct", "top5_correct", "images", "val_loss"))
    return [
        f"- **Top-1 {percent(top1, images)}**, top-5 {percent(top5, images)}, cross-entropy {loss:.4f} on the "
        f"{images:,} validation images, each counted once, at epoch {last['epoch']:.1f}. This is one run: what "
        "another seed would give is not recorded.",
        f"- Validation data:{_images({'data': metadata.get('validation')}) or ' not recorded'}.",
    ]


def _use(metadata: Mapping[str, Any], vit: PlainViT) -> list[str]:
    gives = f"[1, {vit.num_classes}] logits" if vit.num_classes else f"[1, {vit.embed_dim}] features"
    view = metadata["input"]
    upright = view.get("exif") == "apply"
    return [
        "```python",
        "import timm",
        *(["from PIL import ImageOps"] if upright else []),
        "",
        'model = timm.create_model("local-dir:THIS_FOLDER", pretrained=True).eval()',
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)",
        *(["image = ImageOps.exif_transpose(image)  # photographs upright"] if upright else []),
        f"output = model(transform(image).unsqueeze(0))  # image: PIL, RGB -> {gives}",
        "```",
        "",
        f"The transform takes the middle square, {100 * view['crop']:.4g} % of the shorter side, resizes it to "
        f"{view['size']} x {view['size']} (bicubic) and normalises pixels in [0, 1] by mean {tuple(view['mean'])} and "
        f"deviation {tuple(view['std'])}, as in training. `model.forward_features` gives all tokens.",
        "",
        f"Verified when this folder was written: timm {version('timm')} with torch {version('torch')} gives the "
        "outputs of the run's checkpoint in fp32, bit for bit. Other versions were not tried.",
    ]


def _graphs(metadata: Mapping[str, Any], vit: PlainViT, record: Mapping[str, Any]) -> list[str]:
    """Describe the graphs of the folder, their input, and what int8 cost."""
    if not (graphs := record.get("graphs")):
        return []
    view, inside = metadata["input"], record["with_preprocessing"]
    taken = "uint8 pixels" if inside else f"pixels in [0, 1], minus {tuple(view['mean'])}, over {tuple(view['std'])}"
    turned = "turned upright by EXIF, " if view.get("exif") == "apply" else ""
    files = {"onnx": "`model.onnx` (onnxruntime)", "torch_export": "`model.pt2` (`torch.export.load`)"}
    apart = ", ".join(f"{files[kind]}: {distance:.2g}" for kind, distance in graphs.items())
    lines = [
        "",
        f"Graphs, of any number of images [B, 3, {view['size']}, {view['size']}]: {turned}the middle square, "
        f"{100 * view['crop']:.4g} % of the shorter side, resized (bicubic); {taken}. `preprocess.json` says the same.",
        f"Largest difference from the network in fp32, as a share of its largest output: {apart}.",
    ]
    if int8 := record.get("int8"):
        in_float = ", ".join(map(code, int8["in_float"])) or "none"
        lines.append(
            f"`model_int8.onnx`: static, with {int8['calibration_images']} training images ({int8['method']}); top-1 "
            f"{100 * int8['top1_int8']:.2f} % where fp32 has {100 * int8['top1_fp32']:.2f} % ({int8['images']:,} "
            f"images). Layers in float: {in_float}."
        )
    return lines


def _limits(metadata: Mapping[str, Any], vit: PlainViT) -> list[str]:
    lines = [
        f"- Trained at {metadata['input']['size']} px with the normalisation above. No other size is recorded.",
        "- Nothing is recorded on other data sets, robustness, calibration or fairness.",
    ]
    if not vit.num_classes:
        lines.append("- There is no classifier: features for fine-tuning, or for a head of your own.")
    elif not metadata.get("classes"):
        lines.append("- The names of the classes are not recorded: outputs are in the order of the labels' numbers.")
    return lines
