"""Every kind of source behind one door: options in, rows and records out."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

from glipv2.data_prep.coco import coco_source
from glipv2.data_prep.coco_captions import coco_captions_source
from glipv2.data_prep.flickr30k_entities import flickr30k_source
from glipv2.data_prep.glip_tsv import glip_tsv_source
from glipv2.data_prep.lvis import lvis_source
from glipv2.data_prep.mdetr import mdetr_source
from glipv2.data_prep.pairs import CAPTION_FIELDS, pairs_source
from glipv2.data_prep.phrasecut import phrasecut_source
from glipv2.data_prep.refcoco import refcoco_source
from glipv2.data_prep.source import Source
from glipv2.data_prep.toy import toy_source
from glipv2.data_prep.visual_genome import visual_genome_source
from glipv2.data_prep.voc import voc_source
from glipv2.data_prep.vqav2 import vqav2_source
from glipv2.data_prep.webdataset import JSON_FIELDS, webdataset_source
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
    says: Mapping[str, str] = {}
    """Option -> what it is for this source."""


BY_DEFAULT = "the field that holds the text; without it the first with text of "
KINDS = {
    "toy": Kind(toy_source, ("set", "count"), ("size", "hard", "seed"),
                "rendered scenes of coloured shapes; all truth known"),
    "coco": Kind(coco_source, ("annotations", "images"), (),
                 "COCO, Objects365, OpenImages, ODinW: an instances JSON file",
                 {"annotations": "the instances JSON file"}),
    "lvis": Kind(lvis_source, ("annotations", "images"), (),
                 "LVIS: its JSON file, with the federated fields",
                 {"annotations": "the JSON file"}),
    "glip-tsv": Kind(glip_tsv_source, ("annotations",), (),
                     "GLIP's TSV files, detection or captions: the YAML that names them",
                     {"annotations": "the YAML file"}),
    "visual-genome": Kind(visual_genome_source, ("annotations", "images"), ("min_count",),
                          "Visual Genome: objects.json or region_descriptions.json",
                          {"annotations": "objects.json, region_descriptions.json or both, and "
                                          "image_data.json",
                           "images": "folders VG_100K and VG_100K_2, or the one that holds them"}),
    "mdetr": Kind(mdetr_source, ("annotations", "images"), (),
                  "MDETR's JSON with tokens_positive: Flickr30k, the mixed set, GQA",
                  {"annotations": "the JSON file"}),
    "refcoco": Kind(refcoco_source, ("annotations", "images"), ("split",),
                    "RefCOCO/+/g: refs as JSON with instances.json, or MDETR's JSON",
                    {"annotations": "the refs as JSON and instances.json, or one file alone",
                     "split": "train, val, testA, ...: of refs (default: all)"}),
    "phrasecut": Kind(phrasecut_source, ("annotations", "images"), (),
                      "VGPhraseCut: refer_SPLIT.json, or MDETR's JSON",
                      {"annotations": "refer_SPLIT.json, perhaps image_data_split.json; or "
                                      "MDETR's file alone"}),
    "voc": Kind(voc_source, ("annotations", "images"), ("list",),
                "PASCAL VOC: a folder of XML files",
                {"annotations": "the folder of XML files",
                 "list": "a file of image names, as in ImageSets/Main: only these"}),
    "yolo": Kind(yolo_source, (), ("root", "split", "images", "annotations"),
                 "YOLO: root with data.yaml and split, or folders of images and labels",
                 {"root": "the folder with data.yaml",
                  "split": "of root: train, val or test (default: the only one with images)",
                  "annotations": "the folder of labels, in it or beside it classes.txt"}),
    "flickr30k-entities": Kind(flickr30k_source, ("root",), ("images", "list"),
                               "Flickr30k Entities: the folder of Sentences and Annotations",
                               {"root": "the folder of Sentences and Annotations",
                                "images": "folders of images (default: below root)"}),
    "vqav2": Kind(vqav2_source, ("annotations", "images"), (),
                  "VQAv2: questions and answers JSON; or one table of both",
                  {"annotations": "the questions JSON and, but for a test split, the annotations "
                                  "JSON; or one table (.csv, .tsv, .jsonl)"}),
    "coco-captions": Kind(coco_captions_source, ("annotations", "images"), ("split",),
                          "COCO captions: the official JSON, or Karpathy's and a split",
                          {"annotations": "captions_*.json or dataset_*.json",
                           "split": "of Karpathy's file: train, trainrestval, val, test "
                                    "(default: all)"}),
    "pairs": Kind(pairs_source, ("root",), ("images", "caption_field"),
                  "images with texts: .jsonl, .csv, .tsv, or a .txt beside each image",
                  {"root": "the table, or the folder of it or of images with .txt files",
                   "images": "folders that the paths in a table start from (default: its own)",
                   "caption_field": BY_DEFAULT + ", ".join(CAPTION_FIELDS)}),
    "webdataset": Kind(webdataset_source, ("root",), ("caption_field",),
                       "image-text pairs in tars, as img2dataset writes them",
                       {"root": "the folder of tars, or one tar",
                        "caption_field": "the field of the JSON that holds the text; without it "
                                         "the .txt, else the first with text of "
                                         + ", ".join(JSON_FIELDS)}),
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
