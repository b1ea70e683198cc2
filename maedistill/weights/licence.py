"""What the licence of the weights that went in means for those that came out, in words and as model hubs write it.

The text is what a run's run.json says: as its teacher or start names it, or "yours: ..." and "not stated ...".
"""

import re
from collections.abc import Iterable

NO_OTHERS = "yours: no other weights were used"

# Identifiers of the Hugging Face hub. One that restricts counts wherever the text names it, others only on their own.
_NON_COMMERCIAL = ("cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "cc-by-nc-4.0")
_FREE = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc0-1.0")


def hub_licence(text: str) -> tuple[str, str | None]:
    """The hub's identifier for a licence in words, and a name where that is only "other".

    "CC BY-NC 4.0" -> ("cc-by-nc-4.0", None); "research only" -> ("other", "research-only").
    """
    if text.startswith("yours"):
        return "other", "to-be-chosen-by-who-trained-it"
    slug = re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")
    for identifier in _NON_COMMERCIAL:
        if re.search(rf"(^|-){re.escape(identifier)}(-|$)", slug):
            return identifier, None
    return (slug, None) if slug in _FREE else ("other", slug[:60].strip("-."))


def combined_licence(licences: Iterable[str]) -> str:
    """The licence of weights that derive from several, in the words of a run: each once, those not stated last."""
    others = dict.fromkeys(text for text in licences if not text.startswith("yours"))
    return "; ".join(sorted(others, key=lambda text: text.startswith("not stated"))) or NO_OTHERS


def licence_sentence(text: str) -> str:
    """What whoever uses the weights must know."""
    if text.startswith("yours"):
        return "no weights of others went in, here or in the runs before: it is the choice of who trained these."
    if text.startswith("not stated"):
        return (
            "**not stated** by the source of the weights that these derive from. It applies to these as well: find out "
            "what it is before you use them or pass them on."
        )
    said = f"these weights derive from others, whose licence applies to them as well: **{text}**."
    return f"{said} It forbids commercial use." if hub_licence(text)[0] in _NON_COMMERCIAL else said
