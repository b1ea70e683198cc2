"""The license of weights that derive from other weights, as a sentence and as a model hub's identifier.

The text comes from a run's run.json: as its teacher or initial weights state it, or "yours: ..." and "not stated ...".
"""

import re
from collections.abc import Iterable

from maedistill.errors import ConfigError
from maedistill.escaping import markdown

NO_OTHERS = "yours: no other weights were used"
NOT_STATED = "not stated"

# Identifiers of the Hugging Face hub. A restrictive one counts anywhere in the text, a free one only as the whole text.
_NON_COMMERCIAL = re.compile("(?<![^-])cc-by-nc-(?:(?:sa-)?[234]|nd-[34])[.]0(?![^-])")
_FORBIDS_COMMERCE = re.compile("(^|-)(by-nc|non-?commercial)(-|$)")
_FREE = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc0-1.0")
_LONGEST = 200  # name of a license
# How a text begins that names no license: "unknown", the hub's "other", "see README", or nothing; not "not for sale".
_UNSTATED = re.compile(
    "(licen[cs]e-(is-)?)?((unknown|unspecified|unstated|unlicensed|undefined|unclear|other|none|null|nan|n-?a|tb[ad]|"
    "to-be|todo|missing|see|without|not(?!-for)|no-([a-z]+-)?licen[cs]e)(-|$)|no$|(licen[cs]e)?$)"
)


def hub_license(text: str) -> tuple[str, str | None]:
    """Return the hub's identifier for a license text, and a license name if the identifier is only "other".

    "CC BY-NC 4.0" -> ("cc-by-nc-4.0", None); "research only" -> ("other", "research-only"). Of several licenses none is
    left out: "mit; cc-by-nc-4.0" -> ("other", "mit-cc-by-nc-4.0").
    """
    if text.startswith("yours"):
        return "other", "to-be-chosen-by-who-trained-it"
    each = list(dict.fromkeys(map(_slug, text.split(";"))))
    known = {*_NON_COMMERCIAL.findall(each[0])} or {*_FREE} & {each[0]}
    if len(each) == len(known) == 1:
        return known.pop(), None
    return "other", "-".join(each)[:_LONGEST].strip("-.")


def why_unpublishable(text: str, former: str = "") -> str | None:
    """Return why weights with this license may not be published, or None. former: of the run that they started from."""
    for part in text.split(";"):
        if _UNSTATED.match(_slug(part)):
            return f"the license of the weights is not stated ({part.strip() or 'empty'})"
    if not set(map(_slug, _stated(former))) <= set(map(_slug, text.split(";"))):
        return f"the license of the weights is given as {text}, but they derive from weights of {former}"
    return None


def completed_license(text: str, setting: str | None, key: str) -> str:
    """Return the license of a source, with that of the setting `key` in place of what the source does not state.

    Raises ConfigError where the source states another, and for a setting that calls weights of others yours.
    """
    if not setting or _slug(setting) == _slug(text):
        return text
    stated = _stated(text)
    if _slug(setting).startswith("yours") or (stated and len(stated) == len(text.split(";"))):
        raise ConfigError(
            f"{key}: {setting!r} is not the license of the source, which is {text!r}",
            "remove it: it is for sources that state no license",
        )
    return combined_license([*stated, setting])


def _stated(text: str) -> list[str]:
    """Return the parts of a license text that name a license of others."""
    parts = [] if text.startswith("yours") else text.split(";")
    return [part for part in parts if not _UNSTATED.match(_slug(part))]


def _slug(text: str) -> str:
    """Return a license text in lower case with hyphens in place of spaces and signs."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def combined_license(licenses: Iterable[str]) -> str:
    """Combine the licenses of several source weights into one text: each once, those that are not stated last."""
    others = dict.fromkeys(text.strip() or NOT_STATED for text in licenses if not text.startswith("yours"))
    return "; ".join(sorted(others, key=lambda text: text.startswith("not stated"))) or NO_OTHERS


def license_sentence(text: str) -> str:
    """Return the sentence that tells users of the weights which license applies."""
    if text.startswith("yours"):
        return "no weights of others went in, here or in the runs before: it is the choice of who trained these."
    if text.startswith("not stated"):
        return (
            "**not stated** by the source of the weights that these derive from. It applies to these as well: find out "
            "what it is before you use them or pass them on."
        )
    sentence = f"these weights derive from others, whose license applies to them as well: **{markdown(text)}**."
    return f"{sentence} It forbids commercial use." if _FORBIDS_COMMERCE.search(_slug(text)) else sentence
