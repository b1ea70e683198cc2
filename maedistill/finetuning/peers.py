"""The peers of mutual learning: other students, which are trained in the same run as the config's own.

distill.mutual.students -> peer_configs -> open_peers: each a network with a seed, weights and a head of its own

A peer is the run's own student, but for the settings that its text names: "student.width=192 student.num_heads=3".
"""

from dataclasses import dataclass
from typing import Any

from maedistill.config.finetune import FinetuneConfig
from maedistill.config.loader import COMMAND_LINE, cut_settings, load_config
from maedistill.config.schema import Triple
from maedistill.errors import ConfigError, UserError
from maedistill.finetuning.build import build_classifier, build_init_source
from maedistill.models.vits import PlainViT, num_params_m
from maedistill.weights.from_run import describe_network
from maedistill.weights.network import Network

_OWN = ("seed", "init.", "student.")  # the settings in which students may differ


@dataclass(frozen=True)
class Peer:
    """A student in addition to the config's own. source: of its initial weights, None from scratch."""

    config: FinetuneConfig
    source: Network | None
    vit: PlainViT

    @property
    def metadata(self) -> dict[str, Any]:
        """Return the entries of run.json that differ from those of the run's own student."""
        source = self.source
        return {
            "network": describe_network(self.vit),
            "seed": self.config.seed,
            "init": source.describe() if source is not None else None,
            "origin": source.origin if source is not None else None,
        }

    def describe(self) -> str:
        """Return one line for the log."""
        start = self.source.describe() if self.source is not None else "from scratch"
        vit = self.vit
        return f"{vit.embed_dim} x {len(vit.blocks)}, {num_params_m(vit):.2f} M, seed {self.config.seed}, {start}"


def peer_configs(config: FinetuneConfig) -> list[FinetuneConfig]:
    """Return the config of each peer, without distillation. Raises ConfigError for settings that peers must share."""
    key, configs = "distill.mutual.students", []
    base = config.model_dump(mode="json", exclude={"distill"}, exclude_defaults=True)
    for number, text in enumerate(config.distill.mutual.students, 1):
        try:
            given = {**base, "seed": config.seed + number}
            peer = load_config(given, cut_settings(text), root=FinetuneConfig, to_run=False)
        except UserError as error:
            raise ConfigError(f"{key}: {text!r}: {error.cause}", error.remedy) from error
        named = [name for name, origin in peer.origins.items() if origin == COMMAND_LINE]
        if foreign := [name for name in named if not name.startswith(_OWN)]:
            raise ConfigError(
                f"{key}: {text!r} sets {foreign[0]}", "students may differ only in init.*, student.* and seed"
            )
        configs.append(peer.config)
    seeds = [config.seed, *(peer.seed for peer in configs)]
    if len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"{key}: two students have the seed {max(seeds, key=seeds.count)}: each needs its own",
            "give each another one, or leave the seeds out",
        )
    return configs


def open_peers(config: FinetuneConfig, *, num_classes: int, mean: Triple, std: Triple) -> list[Peer]:
    """Open the weights of the peers and build their networks. mean, std: of the images that all students see.

    Raises ConfigError for a peer whose weights expect other images, DataError for weights that cannot be loaded.
    """
    peers = []
    for number, (peer, text) in enumerate(zip(peer_configs(config), config.distill.mutual.students, strict=True), 1):
        try:
            source = build_init_source(peer, num_classes=num_classes)
            vit = build_classifier(peer, source, num_classes=num_classes)
        except UserError as error:
            other = "; or let this student begin without weights: init.source=null and a student.model"
            remedy = f"in this text: {error.remedy}{other if peer.init.source else ''}"
            raise type(error)(f"distill.mutual.students: {text!r}: {error.cause}", remedy) from error
        if source is not None and config.data.mean is None and (source.mean, source.std) != (mean, std):
            raise ConfigError(
                f"distill.mutual.students: peer {number} has images of mean {source.mean}, the student of {mean}",
                "set data.mean and data.std, which then apply to all of them",
            )
        peers.append(Peer(peer, source, vit))
    return peers
