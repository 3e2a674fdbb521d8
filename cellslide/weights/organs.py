"""Organs by name: those that weights were trained on, those that everybody knows, and words that are neither."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

from cellslide.errors import UsageError
from cellslide.types import ClassifierSpec

log = logging.getLogger(__name__)

UNKNOWN = "unknown"
UNKNOWN_WORDS = ("", "unknown", "unk", "none")
# Names that a slide's organ may have, after TCGA, GTEx, PanNuke and NuInsSeg; other words for them behind.
VOCABULARY: dict[str, tuple[str, ...]] = {
    "adrenal gland": ("adrenal",),
    "anus": ("anal canal",),
    "appendix": (),
    "bile duct": ("biliary tract",),
    "bladder": ("urinary bladder",),
    "blood vessel": ("artery", "aorta", "vein"),
    "bone": ("femur",),
    "bone marrow": (),
    "brain": ("cerebrum", "cerebellum"),
    "breast": ("mammary gland",),
    "cervix": ("uterine cervix",),
    "colon": ("colorectum", "colorectal", "large intestine"),
    "diaphragm": (),
    "endometrium": (),
    "epiglottis": (),
    "esophagus": ("oesophagus", "gullet"),
    "eye": ("retina",),
    "fallopian tube": (),
    "fat": ("adipose tissue", "adipose"),
    "gallbladder": (),
    "head and neck": ("head-neck",),
    "heart": ("myocardium",),
    "kidney": ("renal",),
    "larynx": (),
    "liver": ("hepatic",),
    "lung": ("bronchus",),
    "lymph node": ("lymph-node",),
    "muscle": ("skeletal muscle",),
    "nasal cavity": (),
    "nerve": ("peripheral nerve",),
    "oral cavity": ("mouth",),
    "ovary": ("ovarian",),
    "pancreas": ("pancreatic",),
    "parathyroid": ("parathyroid gland",),
    "penis": (),
    "peritoneum": (),
    "pharynx": (),
    "pituitary": ("pituitary gland",),
    "placenta": (),
    "pleura": (),
    "prostate": ("prostatic",),
    "rectum": (),
    "salivary gland": ("parotid",),
    "skin": ("melanoma", "dermis"),
    "small intestine": ("duodenum", "jejunum", "ileum"),
    "soft tissue": (),
    "spinal cord": (),
    "spleen": (),
    "stomach": ("gastric",),
    "testis": ("testes", "testicle"),
    "thymus": (),
    "thyroid": ("thyroid gland",),
    "tongue": (),
    "tonsil": ("palatine tonsil",),
    "umbilical cord": (),
    "ureter": (),
    "uterus": ("uterine corpus",),
    "vagina": (),
    "vulva": (),
}


@dataclass(frozen=True, slots=True)
class Organ:
    """The organ of a slide.

    index    its row in the weights' embedding, -1 for the unknown organ.
    trained  whether the weights were trained on it; None where nobody named it.
    """

    name: str
    index: int
    trained: bool | None = True


def find_organ(spec: ClassifierSpec, word: str | None) -> Organ:
    """Return the organ that a word means to these weights, as `look_up`, with a warning if it was not trained."""
    organ = look_up(spec, word)
    if organ.trained is None:
        log.warning("%s", _not_named(spec))
    elif not organ.trained:
        log.warning("%s", _not_trained(spec, organ.name))
    return organ


def look_up(spec: ClassifierSpec, word: str | None) -> Organ:
    """Return the organ that a word means to these weights; case, blanks, - and _ make no difference.

    None and "unknown" are the unknown organ; an organ of the vocabulary that the weights were not trained on runs as
    the unknown organ under its name. Raises UsageError with near names for any other word.
    """
    plain = _plain(word or "")
    if plain in UNKNOWN_WORDS:
        return Organ(UNKNOWN, -1, None)
    name = canonical(plain)
    for i, organ in enumerate(spec.organs):
        if plain == _plain(organ) or (name is not None and name == canonical(organ)):
            return Organ(organ, i, True)
    if name is None:
        raise UsageError(_no_organ(spec, word or "", plain))
    return Organ(name, -1, False)


def organ_by_text(spec: ClassifierSpec, organ: str | None = None) -> Callable[[str], int]:
    """Return what gives the index of the organ that a text names among the weights' organs, -1 for unknown.

    `organ` holds for all texts. Raises UsageError where it is no organ.
    """
    if organ is not None:
        index = find_organ(spec, organ).index
        return lambda text: index

    def find(text: str) -> int:
        words = set(re.findall(r"[a-z]+", text.casefold()))
        return next((i for i, name in enumerate(spec.organs) if name.casefold() in words), -1)

    return find


def canonical(word: str) -> str | None:
    """Return the name in the vocabulary of an organ given by it or by another word for it, None if it has none."""
    return _NAMES.get(_plain(word))


def _plain(word: str) -> str:
    return re.sub(r"[\s_-]+", " ", word).strip().lower()


_NAMES = {_plain(word): name for name, others in VOCABULARY.items() for word in (name, *others)}


def _not_named(spec: ClassifierSpec) -> str:
    if not spec.organs:
        return f"organ unknown, which makes no difference: {spec.name} was trained without organs"
    return f"organ unknown: {_effect(spec)}; --organ names it ({', '.join(spec.organs)} were trained)"


def _not_trained(spec: ClassifierSpec, name: str) -> str:
    trained = ", ".join(spec.organs) or "without organs"
    floor = spec.calibration.abstain_unseen
    strict = "" if floor is None else f"; classes below a probability of {floor:.2f} are not given"
    worth = spec.calibration.accuracy_unseen
    told = "" if worth is None else f"; on an organ left out of training {worth:.0%} of the nuclei were typed right"
    return f"--organ {name}: {spec.name} was not trained on it (trained: {trained}): {_effect(spec)}{strict}{told}"


def _effect(spec: ClassifierSpec) -> str:
    if spec.learned_unknown:
        return "its learned embedding of an unknown organ is used"
    return "features stay unmodulated"


def _no_organ(spec: ClassifierSpec, word: str, plain: str) -> str:
    known = {_plain(organ): organ for organ in spec.organs} | _NAMES
    near = dict.fromkeys(known[w] for w in get_close_matches(plain, known, n=4, cutoff=0.6))
    hint = f"did you mean {', '.join(near)}? " if near else ""
    return (
        f"--organ {word}: no organ of this name; {hint}`cellslide weights show {spec.weights_id or spec.name}` lists "
        "them, `--organ unknown` is for all others"
    )
