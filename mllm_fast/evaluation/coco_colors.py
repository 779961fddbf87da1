"""Choose the photos of one animal and its colour from COCO's files (arXiv 2411.10950, sections 3.2 and 3.3).

The paper asks for the colour of the animal in 1,000 photos of COCO. It does not say how the photos and colours were
found. Here a photo is taken if its annotations have exactly one animal, and if its colour is known: from a table, from
the captions by a rule, or from the model's own answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import InputError, first_line
from ..core.files import write_whole
from .people import read_table, written_table
from .samples import sampled

ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe")
COLORS = {
    "black": (),
    "white": (),
    "brown": (),
    "gray": ("grey",),
    "red": (),
    "orange": (),
    "yellow": (),
    "golden": (),
    "tan": (),
    "blonde": ("blond",),
    "blue": (),
    "green": (),
    "pink": (),
    "purple": (),
}
_OTHER_WORDS = {
    "bird": ("duck", "seagull", "parrot", "pigeon", "goose", "geese", "owl", "swan"),
    "cat": ("kitten", "kitty"),
    "dog": ("puppy",),
    "horse": ("pony",),
    "sheep": ("lamb", "ram"),
    "cow": ("bull", "calf", "cattle"),
}
_BEFORE = 3  # words before the animal among which its colour may stand
_ENDS_PHRASE = {"a", "an", "the", "of", "with", "in", "on", "at", "by", "near", "behind", "beside", "its", "his", "her"}
_COLOR_OF = {word: color for color, others in COLORS.items() for word in (color, *others)}
_WORD = re.compile(r"[a-z]+")
_PREDICATE = re.compile(rf"(?:(?:that|which) )?is ((?:(?:{'|'.join(_COLOR_OF)})\b(?: and )?)+)")


def _forms(animal: str) -> set[str]:
    """Return the words for an animal in captions."""
    words = {animal, *_OTHER_WORDS.get(animal, ())}
    return {form for word in words for form in (word, f"{word}s", f"{word}es", re.sub("y$", "ies", word))}


_ANIMAL_WORDS = {word for animal in ANIMALS for word in _forms(animal)}


@dataclass(frozen=True)
class Photo:
    """A photo of COCO with what is known of its animal.

    Attributes:
        key: The photo's id in COCO's files.
        file_name: The name of its file.
        animal: The animal; "" if there is not exactly one.
        color: The colour of the animal; "" if it is not known.
        reason: Why the photo cannot be used; "" if it can.
    """

    key: Any
    file_name: str
    animal: str = ""
    color: str = ""
    reason: str = ""


def read_photos(annotations: Path, animals: Sequence[str] = ANIMALS) -> tuple[list[Photo], dict[str, Any]]:
    """Return the photos of a file of objects in COCO's format, and the content of the file.

    A photo has a `reason` if it does not show exactly one of the animals, not in a crowd.

    Raises:
        InputError: The file does not exist, or it has another format.
    """
    content = _read(annotations, ("images", "annotations", "categories"))
    try:
        names = {category["id"]: str(category["name"]) for category in content["categories"]}
        shown: dict[Any, list[tuple[str, bool]]] = {image["id"]: [] for image in content["images"]}
        for note in content["annotations"]:
            name = names[note["category_id"]]
            if name in animals and note["image_id"] in shown:
                shown[note["image_id"]].append((name, bool(note.get("iscrowd"))))
        photos = [_photo(image["id"], str(image["file_name"]), shown[image["id"]]) for image in content["images"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{annotations}: not in COCO's format ({type(error).__name__} {error})") from None
    return photos, content


def _photo(key: Any, file_name: str, shown: list[tuple[str, bool]]) -> Photo:
    names = sorted({name for name, _ in shown})
    if not shown:
        return Photo(key, file_name, reason="no animal")
    if len(names) > 1:
        return Photo(key, file_name, reason=f"several animals: {', '.join(names)}")
    if any(crowd for _, crowd in shown):
        return Photo(key, file_name, names[0], reason=f"a crowd of {names[0]}")
    if len(shown) > 1:
        return Photo(key, file_name, names[0], reason=f"{len(shown)} of {names[0]}")
    return Photo(key, file_name, names[0])


def read_captions(file: Path) -> dict[Any, list[str]]:
    """Return the captions of each photo, by its id, from a file of captions in COCO's format.

    Raises:
        InputError: The file does not exist, or it has another format.
    """
    captions: dict[Any, list[str]] = {}
    try:
        for note in _read(file, ("annotations",))["annotations"]:
            captions.setdefault(note["image_id"], []).append(str(note["caption"]))
    except (KeyError, TypeError) as error:
        raise InputError(f"{file}: not COCO's captions ({type(error).__name__} {error})") from None
    return captions


def first_captions(file: Path) -> dict[str, str]:
    """Return the first caption of each photo, by the name of its file, from a file of captions in COCO's format.

    Raises:
        InputError: The file does not exist, or it has another format.
    """
    captions = read_captions(file)
    try:
        names = {image["id"]: str(image["file_name"]) for image in _read(file, ("images",))["images"]}
    except (KeyError, TypeError) as error:
        raise InputError(f"{file}: not COCO's captions ({type(error).__name__} {error})") from None
    return {names[key]: texts[0] for key, texts in captions.items() if key in names}


def read_colors(file: Path) -> dict[str, str]:
    """Return the colour of each photo, by the name of its file, from a CSV table.

    Raises:
        InputError: The file does not exist, or it lacks the columns file_name and color.
    """
    rows = read_table(file, ("file_name", "color"), "a table of colours")
    return {row["file_name"]: row["color"].strip().lower() for _, row in rows}


def colors_in(text: str) -> set[str]:
    """Return the colours that a text names, as `COLORS` calls them."""
    return {_COLOR_OF[word] for word in _WORD.findall(text.lower()) if word in _COLOR_OF}


def colors_of(animal: str, caption: str) -> set[str]:
    """Return the colours that a caption says an animal has.

    A colour counts if it stands in the same phrase as the animal, at most three words before it ("a small brown furry
    dog", "a black and white cat"), or right after it as a predicate ("the dog is brown", "a cat that is black").
    """
    words = _WORD.findall(caption.lower())
    found: set[str] = set()
    for i, word in enumerate(words):
        if word not in _forms(animal):
            continue
        for other in reversed(words[max(0, i - _BEFORE) : i]):
            if other in _ENDS_PHRASE or other in _ANIMAL_WORDS:
                break
            found |= {_COLOR_OF[other]} if other in _COLOR_OF else set()
        predicate = _PREDICATE.match(" ".join(words[i + 1 :]))
        found |= colors_in(predicate[1]) if predicate else set()
    return found


def with_colors(
    photos: Sequence[Photo],
    captions: Mapping[Any, Sequence[str]] | None = None,
    table: Mapping[str, str] | None = None,
    answer: Callable[[Photo], str] | None = None,
) -> list[Photo]:
    """Return the photos with the colour of their animal, or with the reason why it is not known.

    A photo's colour is taken from the first source that knows the photo: the table, the captions, the answer.

    Args:
        photos: The photos.
        captions: The captions of each photo, by its id.
        table: The colours by the names of the files.
        answer: A function that returns a model's answer to the question about the colour.
    """
    return [photo if photo.reason else _with_color(photo, captions or {}, table or {}, answer) for photo in photos]


def _with_color(
    photo: Photo,
    captions: Mapping[Any, Sequence[str]],
    table: Mapping[str, str],
    answer: Callable[[Photo], str] | None,
) -> Photo:
    if table.get(photo.file_name):
        return replace(photo, color=table[photo.file_name])
    found = {color for caption in captions.get(photo.key, ()) for color in colors_of(photo.animal, caption)}
    source = "the captions name"
    if not found and answer is not None:
        try:
            found, source = colors_in(answer(photo)), "the model names"
        except (InputError, OSError) as error:
            return replace(photo, reason=first_line(error))
    if len(found) != 1:
        return replace(photo, reason=f"{source} {', '.join(sorted(found)) or 'no colour'}")
    return replace(photo, color=found.pop())


def with_sample(photos: Sequence[Photo], count: int | None, seed: int) -> list[Photo]:
    """Return the photos, with a reason at all usable ones but a random sample of `count`.

    Raises:
        InputError: `count` is less than 1, or more than the number of usable photos.
    """
    if count is None:
        return list(photos)
    chosen = set(sampled([i for i, photo in enumerate(photos) if not photo.reason], count, seed))
    return [
        replace(photo, reason="not in the sample") if i not in chosen and not photo.reason else photo
        for i, photo in enumerate(photos)
    ]


def write_folder(
    photos: Sequence[Photo], content: Mapping[str, Any], out: Path, seed: int = 0, animals: Sequence[str] = ANIMALS
) -> int:
    """Write the files that the evaluations "heads" and "evidence" take, and a list of all photos.

    - `objects.json`, for --masks: the objects of the photos in COCO's format, where an animal's category has its
      colour, as in "brown dog".
    - `vocabulary.json`, for --vocabulary: the animals and the colours.
    - `sentences.csv`: the sentences S0, S1 and S2 of the paper for each photo.
    - `manifest.csv`: every photo of the file, with the reason why it was dropped.

    Args:
        photos: The photos.
        content: The content of the file of objects that they are from.
        out: The folder; it is made if it does not exist.
        seed: The seed of the choice of another animal for S1 and S2.
        animals: The animals that count, two or more.

    Returns:
        The number of photos that are used.

    Raises:
        InputError: No photo can be used.
    """
    used = {photo.key: photo for photo in photos if not photo.reason}
    if not used:
        raise InputError("no photo shows exactly one animal whose colour is known")
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("objects.json", json.dumps(_objects(used, content))),
        ("vocabulary.json", json.dumps(_vocabulary(list(used.values()), animals), indent=1)),
        ("sentences.csv", _sentences(list(used.values()), seed, animals)),
        ("manifest.csv", _manifest(photos)),
    ):
        write_whole(out / name, text.encode())
    return len(used)


def _objects(used: Mapping[Any, Photo], content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the used photos' objects in COCO's format, with an animal's colour in its category."""
    names = {category["id"]: str(category["name"]) for category in content["categories"]}
    categories: dict[str, int] = {}
    notes = []
    for note in content["annotations"]:
        photo = used.get(note["image_id"])
        if photo is None or note.get("iscrowd"):
            continue
        name = names[note["category_id"]]
        name = f"{photo.color} {name}" if name == photo.animal else name
        notes.append({**note, "category_id": categories.setdefault(name, len(categories) + 1)})
    return {
        "images": [image for image in content["images"] if image["id"] in used],
        "annotations": notes,
        "categories": [{"id": number, "name": name} for name, number in categories.items()],
    }


def _vocabulary(used: Sequence[Photo], animals: Sequence[str]) -> dict[str, Any]:
    colors = {**COLORS, **{photo.color: () for photo in used if photo.color not in COLORS}}
    return {
        "nouns": {animal: sorted(_OTHER_WORDS.get(animal, ())) for animal in sorted(animals)},
        "attributes": {color: list(words) for color, words in sorted(colors.items())},
    }


def _sentences(used: Sequence[Photo], seed: int, animals: Sequence[str]) -> str:
    rng = np.random.default_rng(seed)
    rows = [["file_name", "animal", "color", "other_animal", "question", "S0", "S1", "S2"]]
    for photo in used:
        others = [animal for animal in animals if animal != photo.animal]
        other = others[int(rng.integers(len(others)))]
        told = lambda stated, asked, color=photo.color: (  # noqa: E731
            f"{stated.capitalize()} is {color}. Q: What is the color of the {asked}? A:"
        )
        rows.append(
            [
                photo.file_name,
                photo.animal,
                photo.color,
                other,
                f"Q: What is the color of the {photo.animal}? A:",
                told(photo.animal, photo.animal),
                told(other, photo.animal),
                told(photo.animal, other),
            ]
        )
    return written_table(rows)


def _manifest(photos: Sequence[Photo]) -> str:
    rows = [[photo.file_name, photo.animal, photo.color, photo.reason or "used"] for photo in photos]
    return written_table([["file_name", "animal", "color", "state"], *rows])


def _read(file: Path, parts: Sequence[str]) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: there is no such file") from None
    except ValueError:
        raise InputError(f"{file}: is no JSON") from None
    if not isinstance(content, dict) or not all(isinstance(content.get(part), list) for part in parts):
        raise InputError(f"{file}: not in COCO's format, which has the lists {', '.join(parts)}")
    return content
