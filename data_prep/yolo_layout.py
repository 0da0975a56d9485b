"""Where the images and labels of a YOLO data set are, found out from the names of its files.

One split of a folder with data.yaml, or folders of images and a folder of labels with a
classes.txt. The paths in a data.yaml are often those of its author's machine, so they are looked
for below the folder itself, and nothing outside it is opened.
"""

from collections.abc import Collection, Iterable
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import yaml

from glipv2.data_prep.image_files import (
    FORMAT_OF_SUFFIX,
    OTHER_SUFFIXES,
    ImageFolders,
    check_folder,
    parent,
)
from glipv2.data_prep.text_cleaning import clean_text
from glipv2.pipeline import storage
from glipv2.pipeline.config import PrepareConfig
from glipv2.pipeline.errors import ConfigError, DataError

MAX_BYTES = 16 * 2**20
"""Of a data.yaml or classes.txt."""
SAME_SPLITS = ("val", "valid", "validation")
SPLITS = ("train", "val", "test")
ALL_SPLITS = ("train", *SAME_SPLITS, "test")
CLASSES = "classes.txt"


class Layout(NamedTuple):
    """What is read, found out from the names of files alone."""

    names: dict[int, str]
    """Class number -> name."""
    images: ImageFolders
    labels: str
    """Folder."""
    label_of: dict[str, str]
    """Image -> its label below the folder; empty when there is none."""
    strays: list[str]
    """Labels without an image."""


def yolo_layout(options: PrepareConfig) -> Layout:
    """DataError when there are no images, no names, or not one label."""
    layout = _split_of_root(options) if options.root else _folders(options)
    if not any(layout.label_of.values()):
        raise DataError(
            f"none of the {len(layout.label_of)} images has a label file in {layout.labels}; it "
            "must be named as the image and, with a data.yaml, be in `labels` for one in `images`"
        )
    return layout


def _split_of_root(options: PrepareConfig) -> Layout:
    root = options.root
    if options.images or options.annotations:
        raise ConfigError("a yolo source has either root, or images and annotations")
    check_folder(root, "YOLO")
    where, document = _data_yaml(root)
    known = storage.tree_sizes(root)
    images, listed = _chosen_split(document, options.split, root, known, where)
    label_of = {image: _label(image, known) for image in sorted(images)}
    folders = {parent(label) for label in label_of.values() if "/" in label}
    return Layout(
        names=_names(document, where),
        images=ImageFolders((root,)),
        labels=root,
        label_of=label_of,
        strays=[] if listed else _strays(label_of, (n for n in known if parent(n) in folders)),
    )


def _folders(options: PrepareConfig) -> Layout:
    if not options.images or not options.annotations:
        raise ConfigError(
            "a yolo source needs root (the folder with data.yaml), or images and annotations (the "
            "folder of labels)"
        )
    (labels,), images = options.annotations, ImageFolders(options.images)
    images.check()
    check_folder(labels, "label")
    known = storage.tree_sizes(labels)
    names = {name for url in images.urls for name in storage.tree_sizes(url) if _is_image(name)}
    if not names:
        raise DataError(f"no image in {', '.join(images.urls)}; give the folder that holds them")
    label_of = {name: _first_known([_as_text(name)], known) for name in sorted(names)}
    return Layout(
        names=_class_names(labels),
        images=images,
        labels=labels,
        label_of=label_of,
        strays=_strays(label_of, known),
    )


def _data_yaml(root: str) -> tuple[str, dict[str, Any]]:
    """The file and its content, every scalar as the text that stands there."""
    found = [name for name in storage.list_names(root) if name.endswith((".yaml", ".yml"))]
    if "data.yaml" in found:
        found = ["data.yaml"]
    if len(found) != 1:
        raise DataError(
            f"{root} holds no data.yaml{f' but {len(found)} others' if found else ''}; give a "
            "folder with one, or images and annotations"
        )
    where = storage.join(root, found[0])
    try:
        text = storage.read_bytes(where, 0, MAX_BYTES).decode("utf-8-sig")
        document = yaml.load(text, Loader=yaml.BaseLoader)  # so that a class may be called `no`
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid YAML: {str(error)[:200]}; mend it") from error
    if not isinstance(document, dict):
        raise DataError(f"{where} is no YAML mapping with `names`; check that it is the right file")
    return where, document


def _names(document: dict[str, Any], where: str) -> dict[int, str]:
    """Class number -> name, from a list or a mapping."""
    stated = document.get("names")
    try:
        pairs = stated.items() if isinstance(stated, dict) else enumerate(_list(stated))
        names = {int(number): clean_text(name) for number, name in pairs}
        count = int(document.get("nc", len(names)))
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: names must be a list, or number: name; mend it") from error
    if not names or not all(names.values()) or count != len(names):
        raise DataError(
            f"{where} has {len(names)} names, some of them empty perhaps, and nc {count}; mend it"
        )
    return names


def _list(value: Any) -> list[Any]:
    """The list, or what a key alone stands for: the empty one; TypeError for anything else."""
    if value and not isinstance(value, list):
        raise TypeError(f"{str(value)[:40]!r} is no list")
    return value or []


def _class_names(labels: str) -> dict[int, str]:
    """From the classes.txt in the label folder or beside it."""
    for folder in (labels, parent(labels.rstrip("/"))):
        where = storage.join(folder, CLASSES)
        if storage.exists(where):
            text = storage.read_bytes(where, 0, MAX_BYTES).decode("utf-8-sig", "replace")
            names = [clean_text(line) for line in text.rstrip().splitlines()]
            if not names or not all(names):
                raise DataError(f"{where}: line {names.index('') + 1 if names else 1} is empty")
            return dict(enumerate(names))
    raise DataError(f"no {CLASSES} in {labels} or beside it; write one class name per line there")


def _chosen_split(
    document: dict[str, Any], split: str, root: str, known: Collection[str], where: str
) -> tuple[set[str], bool]:
    """`_split_images` of the split; of the only one that has images when none is asked for.

    DataError when it has no images, or when there is a choice, with the splits that have some.
    """
    if split and (chosen := _split_images(document, split, root, known))[0]:
        return chosen
    found = {name: _split_images(document, name, root, known) for name in SPLITS}
    there = {name: images for name, (images, _) in found.items() if images}
    if not split and len(set(map(frozenset, there.values()))) == 1:
        return found[next(iter(there))]
    named = ", ".join(f"{name} {document[name]}" for name in ALL_SPLITS if document.get(name))
    counted = ", ".join(f"{name} ({len(images)})" for name, images in there.items())
    if there:
        what = f"no images below {root} for split {split!r}" if split else "several splits"
        raise DataError(f"{where}: {what}; give split, one of those with images: {counted}")
    raise DataError(
        f"{where}: no images below {root} for any split (it names {named or 'none'}); put them "
        "there, or give images and annotations themselves"
    )


def _split_images(
    document: dict[str, Any], split: str, root: str, known: Collection[str]
) -> tuple[set[str], bool]:
    """The images of a split, and whether a file lists them."""
    splits = SAME_SPLITS if split in SAME_SPLITS else (split,)
    stated = next((document[name] for name in splits if document.get(name)), "")
    base = document.get("path", "")
    images: set[str] = set()
    listed = False
    for entry in stated if isinstance(stated, list) else [stated]:
        places = [*_endings(f"{base}/{entry}"), *_endings(str(entry))] if entry else []
        for name in splits if split else ():
            places += [f"{name}/images", f"images/{name}", name]
        for place in places:
            if place.endswith(".txt") and place in known:
                found, listed = _listed_images(storage.join(root, place), known), True
            else:
                start = f"{place}/" if place else ""
                found = {name for name in known if name.startswith(start) and _is_image(name)}
            images |= found
            if found:
                break
    return images, listed


def _listed_images(url: str, known: Collection[str]) -> set[str]:
    """Paths below the root; those that are not there stay as they are, to be counted."""
    text = storage.read_bytes(url).decode("utf-8-sig", "replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return {_first_known(_endings(line), known) or _endings(line)[0] for line in lines}


def _endings(path: str) -> list[str]:
    """A path of another machine as paths below a folder here: less and less of its beginning.

    The last part alone may be of any split (`images`), so two stay where there are two.
    """
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return ["/".join(parts[start:]) for start in range(max(len(parts) - 1, 1))]


def _label(image: str, known: Collection[str]) -> str:
    """In `labels` instead of the last `images` of the path, or beside the image."""
    *folders, name = _as_text(image).split("/")
    places = ["/".join([*folders, name])]
    if "images" in folders:
        last = len(folders) - 1 - folders[::-1].index("images")
        places.insert(0, "/".join([*folders[:last], "labels", *folders[last + 1 :], name]))
    return _first_known(places, known)


def _as_text(image: str) -> str:
    return str(PurePosixPath(image).with_suffix(".txt"))


def _first_known(names: list[str], known: Collection[str]) -> str:
    return next((name for name in names if name in known), "")


def _strays(label_of: dict[str, str], names: Iterable[str]) -> list[str]:
    used = set(label_of.values())
    texts = (name for name in names if name.endswith(".txt") and not name.endswith(CLASSES))
    return sorted(set(texts) - used)


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in (*FORMAT_OF_SUFFIX, *OTHER_SUFFIXES)
