"""The pages of every config key: type, default, kind and meaning, from the schema that `--explain` reads."""

import json

from docs_parts.text import GENERATED, cell, table
from maedistill.config.finetune import FinetuneConfig
from maedistill.config.keys import Key, all_keys, all_sections
from maedistill.config.pretrain import PretrainConfig
from maedistill.config.schema import RunConfig

FILES = {PretrainConfig: "pretraining.md", FinetuneConfig: "finetuning.md"}
INDEX = """\
After reading this page you can find any config key, and read what the pages of keys say about it.

```bash
maedistill pretrain --explain align.normalize     # one key
maedistill finetune --explain distill             # a section
maedistill pretrain imagenet/dmae_vit_b --print-config
```

| page | keys |
|---|---|
| [Keys of pre-training](configuration/pretraining.md) | {pretraining} |
| [Keys of fine-tuning](configuration/finetuning.md) | {finetuning} |

The pages have one table per section. Write a key with its section: `optim.epochs=200` on a command line, or in a file

```yaml
optim:
  epochs: 200
```

| column | what it says |
|---|---|
| takes | type and range. `null` unsets a key where it is named |
| default | the value where neither a file nor the command line sets the key. Shipped configs set many |
| changes | **results**: the numbers; a run continues with the same value only. **runtime**: speed, place or logging |
| meaning | what it does, and the values of the papers, where they state one |

MAE is He et al., 2022, DMAE is Bai et al., 2023, AMD is Zhao et al., 2024, TinyMIM is Ren et al., 2023
([all references](citing.md)).

## Sections

{sections}
"""


def index() -> str:
    """Return the page that leads to the others."""
    stages = {PretrainConfig: "pre-training", FinetuneConfig: "fine-tuning"}
    names = sorted({name for root in stages for name in _sections(root)} - {""})
    rows = []
    for name in names:
        links = [
            f"[{stage}](configuration/{FILES[root]}#{_anchor(name)})" if name in _sections(root) else ""
            for root, stage in stages.items()
        ]
        about = next(all_sections(root)[name] for root in stages if name in _sections(root))
        rows.append([f"`{name}`", *links, cell(about.splitlines()[0])])
    counts = {FILES[root][:-3]: f"{len(all_keys(root))} keys" for root in FILES}
    sections = table(["section", "pre-training", "fine-tuning", "about"], rows)
    return f"# Configuration\n\n{GENERATED}\n\n" + INDEX.format(sections=sections, **counts)


def pretraining() -> str:
    """Return the keys of `maedistill pretrain`."""
    return _page(PretrainConfig, "Keys of pre-training", "[pre-training](../pretraining.md)")


def finetuning() -> str:
    """Return the keys of `maedistill finetune`."""
    return _page(FinetuneConfig, "Keys of fine-tuning", "[fine-tuning](../finetuning.md)")


def _page(root: type[RunConfig], title: str, guide: str) -> str:
    parts = [
        f"# {title}",
        GENERATED,
        f"After reading this page you know every key of `maedistill {root.stage}`: {len(all_keys(root))} keys.",
        f"How to read the tables: [configuration](../configuration.md). How to use the keys: {guide}.",
    ]
    for name, keys in _sections(root).items():
        about = all_sections(root)[name].splitlines() if name else ["Keys without a section."]
        parts += [f"## {name or 'Top level'}", about[0]]
        if drawing := "\n".join(about[1:]).strip("\n"):
            parts.append(f"```text\n{drawing}\n```")
        parts.append(table(["key", "takes", "default", "changes", "meaning"], map(_row, keys)))
    return "\n\n".join(parts) + "\n"


def _sections(root: type[RunConfig]) -> dict[str, list[Key]]:
    """Return the keys by section, in the order of the schema; "" has the keys without one."""
    sections: dict[str, list[Key]] = {"": [], **{name: [] for name in all_sections(root)}}
    for key in all_keys(root).values():
        sections[key.name.rpartition(".")[0]].append(key)
    return {name: keys for name, keys in sections.items() if keys}


def _row(key: Key) -> list[str]:
    kind = "results" if key.kind == "result" else "runtime"
    return [f"`{key.name}`", cell(key.words), f"`{json.dumps(key.default)}`", kind, cell(key.doc)]


def _anchor(name: str) -> str:
    """Return the anchor of a heading, as GitHub and the site make it."""
    return name.replace(".", "")
