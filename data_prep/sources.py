"""Every kind of source behind one door: options in, rows and records out."""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from glipv2.data_prep.coco import coco_source
from glipv2.data_prep.coco_captions import coco_captions_source
from glipv2.data_prep.flickr30k_entities import flickr30k_source
from glipv2.data_prep.glip_tsv import glip_tsv_source
from glipv2.data_prep.lvis import lvis_source
from glipv2.data_prep.mdetr import mdetr_source
from glipv2.data_prep.pairs import pairs_source
from glipv2.data_prep.phrasecut import phrasecut_source
from glipv2.data_prep.refcoco import refcoco_source
from glipv2.data_prep.source import Source
from glipv2.data_prep.toy import toy_source
from glipv2.data_prep.visual_genome import visual_genome_source
from glipv2.data_prep.voc import voc_source
from glipv2.data_prep.vqav2 import vqav2_source
from glipv2.data_prep.webdataset import webdataset_source
from glipv2.data_prep.yolo import yolo_source
from glipv2.pipeline.config import PrepareConfig
from glipv2.pipeline.errors import ConfigError, DataError


class Kind(NamedTuple):
    open: Callable[[PrepareConfig], Source]
    """Checks that everything named is there, and reads no image."""
    needs: tuple[str, ...]
    """Options that it can't do without."""
    takes: tuple[str, ...]
    """Options that it also knows."""
    help: str


KINDS = {
    "toy": Kind(toy_source, ("set", "count"), ("size", "hard", "seed"),
                "rendered scenes of coloured shapes; all truth known"),
    "coco": Kind(coco_source, ("annotations", "images"), (),
                 "COCO, Objects365, OpenImages, ODinW: an instances JSON file"),
    "lvis": Kind(lvis_source, ("annotations", "images"), (),
                 "LVIS: its JSON file, with the federated fields"),
    "glip-tsv": Kind(glip_tsv_source, ("annotations",), (),
                     "GLIP's TSV files, detection or captions: the YAML that names them"),
    "visual-genome": Kind(visual_genome_source, ("annotations", "images"), ("min_count",),
                          "Visual Genome: objects.json or region_descriptions.json"),
    "mdetr": Kind(mdetr_source, ("annotations", "images"), (),
                  "MDETR's JSON with tokens_positive: Flickr30k, the mixed set, GQA"),
    "refcoco": Kind(refcoco_source, ("annotations", "images"), ("split",),
                    "RefCOCO/+/g: refs as JSON with instances.json, or MDETR's JSON"),
    "phrasecut": Kind(phrasecut_source, ("annotations", "images"), (),
                      "VGPhraseCut: refer_SPLIT.json, or MDETR's JSON"),
    "voc": Kind(voc_source, ("annotations", "images"), ("list",),
                "PASCAL VOC: a folder of XML files"),
    "yolo": Kind(yolo_source, (), ("root", "split", "images", "annotations"),
                 "YOLO: root with data.yaml and split, or folders of images and labels"),
    "flickr30k-entities": Kind(flickr30k_source, ("root",), ("images", "list"),
                               "Flickr30k Entities: the folder of Sentences and Annotations"),
    "vqav2": Kind(vqav2_source, ("annotations", "images"), (),
                  "VQAv2: questions and answers JSON; or one table of both"),
    "coco-captions": Kind(coco_captions_source, ("annotations", "images"), ("split",),
                          "COCO captions: the official JSON, or Karpathy's and a split"),
    "pairs": Kind(pairs_source, ("root",), ("images", "caption_field"),
                  "images with texts: .jsonl, .csv, .tsv, or a .txt beside each image"),
    "webdataset": Kind(webdataset_source, ("root",), ("caption_field",),
                       "image-text pairs in tars, as img2dataset writes them"),
}  # fmt: skip
MANY_FILES: tuple[str, ...] = ("visual-genome", "refcoco", "phrasecut", "vqav2")
"""Kinds whose `annotations` may be several files."""


def open_source(options: PrepareConfig) -> Source:
    """Check that everything named is there, before any work starts."""
    kind = KINDS[options.source]
    missing = [name for name in kind.needs if not getattr(options, name)]
    if missing:
        raise ConfigError(f"a {options.source} source needs {' and '.join(missing)}")
    if len(options.annotations) > 1 and options.source not in MANY_FILES:
        raise ConfigError(f"a {options.source} source takes one annotation file at a time")
    source = kind.open(options)
    if len(set(source.categories)) != len(source.categories):
        name, _ = Counter(source.categories).most_common(1)[0]
        where = ", ".join(options.annotations) or options.root
        raise DataError(f"{where}: category {name!r} occurs twice; rename one")
    return source
